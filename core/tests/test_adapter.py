"""The smallest module between one feature's shape and another's."""

import pytest
import torch
from torch.nn import functional as F

from distill.model.adapter import Adapter
from distill.testing import ToyConvNet

PAIRS = [
    ((2, 3), (2, 3), "nothing"),
    ((2, 3), (2, 5), "linear layer 3 -> 5"),
    ((2, 3, 4, 6), (2, 3, 4, 6), "nothing"),
    ((2, 3, 4, 6), (2, 5, 4, 6), "1x1 convolution 3 -> 5"),
    ((2, 3, 8, 8), (2, 3, 4, 4), "average pooling"),
    ((2, 3, 4, 4), (2, 3, 8, 8), "interpolation"),
    ((2, 3, 8, 8), (2, 5, 4, 4), "average pooling, 1x1 convolution 3 -> 5"),
    ((2, 3, 4, 4), (2, 5, 7, 7), "1x1 convolution 3 -> 5, interpolation"),
    ((2, 3, 8, 2), (2, 5, 4, 4), "average pooling, 1x1 convolution 3 -> 5, interpolation"),
    ((2, 3, 4, 6), (2, 3), "mean over positions"),
    ((2, 3, 4, 6), (2, 5), "mean over positions, linear layer 3 -> 5"),
    ((2, 7, 3), (2, 5), "mean over tokens, linear layer 3 -> 5"),
    ((2, 9, 3), (2, 3, 3, 3), "tokens to map"),
    ((2, 10, 3), (2, 5, 3, 3), "tokens to map, 1x1 convolution 3 -> 5"),
    (
        (2, 17, 3),
        (2, 5, 2, 6),
        "tokens to map, average pooling, 1x1 convolution 3 -> 5, interpolation",
    ),
    ((2, 3, 3, 3), (2, 9, 3), "map to tokens"),
    ((2, 3, 4, 4), (2, 9, 5), "map to tokens, average pooling, linear layer 3 -> 5"),
    ((2, 3, 2, 2), (2, 9, 5), "map to tokens, linear layer 3 -> 5, interpolation"),
    ((2, 7, 3), (2, 7, 3), "nothing"),
    ((2, 7, 3), (2, 7, 5), "linear layer 3 -> 5"),
    ((2, 16, 3), (2, 4, 3), "average pooling"),
    ((2, 5, 3), (2, 17, 4), "linear layer 3 -> 4, interpolation"),
    ((2, 18, 3), (2, 10, 4), "average pooling, linear layer 3 -> 4"),
    ((2, 18, 3), (2, 9, 3), "average pooling"),
]
"""Shapes of the feature and of what it is to be like, and what is done."""


def adapter(source, goal):
    torch.manual_seed(0)
    made = Adapter()
    made.setup(source, goal)
    return made


def of(*shape):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator)


def weight_and_bias(made):
    layer = made.parts[0].layer
    return layer.weight.detach().flatten(1), layer.bias.detach()


@pytest.mark.parametrize(("source", "goal", "words"), PAIRS)
def test_a_feature_gets_the_others_shape_by_what_the_words_say(source, goal, words):
    made = adapter(of(*source), of(*goal))
    assert made(of(*source), of(*goal)).shape == goal
    assert made.chosen == [words]


@pytest.mark.parametrize(("source", "goal", "words"), PAIRS)
def test_gradients_reach_the_feature_and_the_layer_and_not_what_it_is_to_be_like(
    source, goal, words
):
    features, like = of(*source).requires_grad_(), of(*goal).requires_grad_()
    made = adapter(features, like)
    made(features, like).square().sum().backward()
    assert features.grad.abs().sum() > 0
    assert like.grad is None
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
    assert bool(list(made.parameters())) == ("->" in words)


def test_only_the_shape_of_what_it_is_to_be_like_is_used():
    source, goal = of(2, 3, 6, 6), of(2, 5, 4, 4)
    made = adapter(source, goal)
    assert torch.equal(made(source, goal), made(source, goal * torch.nan))


def bilinear(size, goal):
    """A row for each place of the goal: the shares of the places that it lies between."""
    shares = torch.zeros(goal, size)
    for place in range(goal):
        at = min(max((place + 0.5) * size / goal - 0.5, 0.0), size - 1.0)
        low = min(int(at), size - 2) if size > 1 else 0
        shares[place, low] += 1 - (at - low)
        if size > 1:
            shares[place, low + 1] += at - low
    return shares


def pooling(size, goal):
    """The same for average pooling: each place has the mean of what it covers."""
    shares = torch.zeros(goal, size)
    for place in range(goal):
        covered = range(place * size // goal, -(-(place + 1) * size // goal))
        shares[place, list(covered)] = 1 / len(covered)
    return shares


@pytest.mark.parametrize("sizes", [(9, 6), (4, 8), (10, 3)])
def test_maps_meet_as_a_formula_says(sizes):
    """Height is pooled or stretched, width the other way; in between channels are mixed."""
    height, width = sizes
    source, goal = of(2, 3, height, width), of(2, 4, width, height)
    made = adapter(source, goal)
    weight, bias = weight_and_bias(made)
    first = pooling if height > width else bilinear
    second = bilinear if height > width else pooling
    mixed = torch.einsum("bchw,dc->bdhw", source, weight) + bias[:, None, None]
    expected = torch.einsum("bdhw,ih,jw->bdij", mixed, first(height, width), second(width, height))
    torch.testing.assert_close(made(source, goal), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_tokens_become_a_map_row_by_row_without_their_class_tokens(classes):
    source, goal = of(2, classes + 9, 3), of(2, 4, 3, 3)
    made = adapter(source, goal)
    weight, bias = weight_and_bias(made)
    found = made(source, goal)
    for row in range(3):
        for column in range(3):
            token = source[:, classes + 3 * row + column]
            expected = token @ weight.T + bias
            torch.testing.assert_close(found[:, :, row, column], expected, rtol=1e-5, atol=1e-6)


def test_a_map_becomes_tokens_row_by_row():
    source, goal = of(2, 3, 2, 2), of(2, 4, 3)
    rows = [source[:, :, h, w] for h in range(2) for w in range(2)]
    assert torch.equal(adapter(source, goal)(source, goal), torch.stack(rows, 1))


def test_maps_and_tokens_become_vectors_by_their_mean():
    maps, tokens = of(2, 3, 4, 6), of(2, 7, 3)
    torch.testing.assert_close(adapter(maps, of(2, 3))(maps, of(2, 3)), maps.mean((2, 3)))
    torch.testing.assert_close(adapter(tokens, of(2, 3))(tokens, of(2, 3)), tokens.mean(1))


def test_class_tokens_are_kept_where_both_have_them_while_the_others_are_pooled():
    source, goal = of(2, 17, 3), of(2, 5, 3)
    found = adapter(source, goal)(source, goal)
    assert torch.equal(found[:, 0], source[:, 0])
    square = source[:, 1:].reshape(2, 2, 2, 2, 2, 3)  # block, row in it, block, column in it
    torch.testing.assert_close(found[:, 1:], square.mean((2, 4)).reshape(2, 4, 3))


def test_of_surplus_class_tokens_the_last_are_kept():
    source, goal = of(2, 18, 3), of(2, 5, 3)
    assert torch.equal(adapter(source, goal)(source, goal)[:, 0], source[:, 1])


def test_channels_are_mixed_after_what_shrinks_and_before_what_widens():
    """On the smaller of the two sizes, that is, where it costs least."""
    for source, goal, size in ((8, 4, 4), (4, 8, 4)):
        features, like = of(2, 3, source, source), of(2, 5, goal, goal)
        made = adapter(features, like)
        seen = []
        made.parts[0].layer.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0].shape[2], out.shape[2]))
        )
        made(features, like)
        assert seen == [(size, size)]


@pytest.mark.parametrize(
    ("sources", "goals"),
    [
        (((2, 3, 8, 8), (3, 3, 9, 5), (1, 3, 2, 2)), ((2, 5, 4, 4), (3, 5, 4, 4), (1, 5, 4, 6))),
        (((2, 17, 3), (2, 26, 3), (1, 10, 3)), ((2, 5, 4, 4), (2, 5, 7, 3), (1, 5, 1, 1))),
        (((2, 3, 4, 4), (2, 3, 6, 6)), ((2, 16, 5), (2, 9, 5))),
        (((2, 16, 3), (2, 25, 3)), ((2, 4, 5), (2, 36, 5))),
        (((2, 3, 4, 4), (5, 3, 1, 7)), ((2, 5), (5, 5))),
        (((2, 6, 3), (2, 9, 3)), ((2, 6, 5), (2, 9, 5))),
    ],
)
def test_sizes_may_change_from_batch_to_batch(sources, goals):
    made = adapter(of(*sources[0]), of(*goals[0]))
    for source, goal in zip(sources, goals, strict=True):
        assert made(of(*source), of(*goal)).shape == goal


def test_several_features_meet_one_by_one():
    sources = [of(2, 3, 8, 8), of(2, 6, 4, 4), of(2, 7)]
    goals = [of(2, 4, 8, 8), of(2, 6, 2, 2), of(2, 7)]
    torch.manual_seed(0)
    made = Adapter()
    made.setup(sources, goals)
    found = made(sources, goals)
    assert [one.shape for one in found] == [goal.shape for goal in goals]
    assert made.chosen == ["1x1 convolution 3 -> 4", "average pooling", "nothing"]
    torch.testing.assert_close(found[1], F.avg_pool2d(sources[1], 2))
    assert found[2] is sources[2]


def test_one_feature_gives_one_and_a_list_of_one_a_list():
    source, goal = of(2, 3), of(2, 5)
    made = adapter(source, goal)
    assert isinstance(made(source, goal), torch.Tensor)
    (alone,) = made([source], [goal])
    assert torch.equal(alone, made(source, goal))


def test_numbers_of_features_that_differ_are_refused():
    with pytest.raises(ValueError, match="1 features cannot meet 2 others"):
        Adapter().setup([of(2, 3)], [of(2, 3), of(2, 3)])


@pytest.mark.parametrize(
    ("source", "goal"),
    [
        ((2, 3), (2, 5, 4, 4)),
        ((2, 3), (2, 9, 5)),
        ((2,), (2,)),
        ((2, 3, 4, 4, 4), (2, 3, 4, 4, 4)),
        ((2, 7, 3), (2, 5, 4, 4)),  # no square
        ((2, 3, 4, 6), (2, 9, 5)),
        ((2, 3, 4, 4), (2, 10, 5)),  # a class token out of nothing
        ((2, 3, 4, 4), (2, 7, 5)),
        ((2, 9, 3), (2, 10, 3)),
        ((2, 7, 3), (2, 9, 3)),
        ((2, 9, 3), (2, 7, 3)),
    ],
)
def test_shapes_that_nothing_makes_meet_are_refused_with_both(source, goal):
    with pytest.raises(ValueError, match="no adapter makes") as caught:
        Adapter().setup(of(*source), of(*goal))
    assert f"no adapter makes {source} meet {goal}; it knows vectors" in str(caught.value)
    assert str(caught.value).endswith("write an auxiliary module")


def test_layers_are_built_where_the_feature_is():
    made = Adapter()
    made.setup(of(2, 3).to("meta"), of(2, 5).to("meta"))
    assert all(p.device.type == "meta" for p in made.parameters())


def test_it_goes_between_a_convolutions_maps_and_a_vector():
    net, images = ToyConvNet(width=4), of(2, 1, 6, 6)
    features = net.conv(images)
    made = adapter(features, of(2, 7))
    assert made(features, of(2, 7)).shape == (2, 7)
