"""ReviewFusion and HCLLoss: reference numbers, formulas written out, levels and their sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.knowledge_review import HCLLoss, ReviewFusion

METHOD = "kr"

IN_CHANNELS, OUT_CHANNELS, SIZES = [3, 4, 6], [5, 4, 7], [8, 4, 1]


def maps(channels, sizes=SIZES, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, n, n) for c, n in zip(channels, sizes, strict=True)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def fusion(seed=0, **params):
    torch.manual_seed(seed)
    return ReviewFusion(IN_CHANNELS, OUT_CHANNELS, **params)


def test_reference_numbers_hold(reference):
    params = reference.params
    loss = HCLLoss(params["output_sizes"])
    if reference.variant == "hcl":
        reference.check(loss(*map(reference.tensor, ("student_feature", "teacher_feature"))))
        return
    students, teachers = (
        [reference.tensor(f"{side}_feature_{level}") for level in range(params["levels"])]
        for side in ("student", "teacher")
    )
    module = ReviewFusion([4, 6, 8], [4, 6, 8], mid_channels=5)
    for level, layers in enumerate(module.layers):
        names = {"conv1": "reduce", "conv2": "expand", "attention_conv": "attention"}
        stored = reference.state(f"abf_{level}")
        renamed = {n: n.replace(n.split(".")[0], names[n.split(".")[0]]) for n in stored}
        reference.load(f"abf_{level}", layers, renamed)
    reference.check(loss(module(students, teachers), teachers))


def pooled_by_hand(x, size):
    """Average-pool one map (H, W), whose sides are multiples of the size."""
    step = x.shape[0] // size
    return torch.stack(
        [
            x[i * step : (i + 1) * step, j * step : (j + 1) * step].mean()
            for i in range(size)
            for j in range(size)
        ]
    )


def hcl_by_hand(student, teacher, sizes):
    batch, channels, height, _ = student.shape
    loss = sum(
        (a - b) ** 2
        for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    )
    loss, total, weight = loss / student.numel(), 1.0, 1.0
    for size in (size for size in sizes if size < height):
        weight, error = weight / 2, 0.0
        for b in range(batch):
            for c in range(channels):
                pair = (pooled_by_hand(x[b, c], size) for x in (student, teacher))
                error += (next(pair) - next(pair)).square().mean().item()
        loss += weight * error / (batch * channels)
        total += weight
    return loss / total


@pytest.mark.parametrize("output_sizes", [[4, 2, 1], [8, 1], [2], []])
def test_hcl_equals_the_formula_written_out(output_sizes):
    students, teachers = (maps([2, 3, 5], [8, 4, 1], seed=s, dtype=torch.float64) for s in (1, 2))
    loss = HCLLoss(output_sizes)(students, teachers)
    pairs = zip(students, teachers, strict=True)
    expected = sum(hcl_by_hand(s, t, output_sizes) for s, t in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_first_size_that_is_used_weighs_one_half():
    student, teacher = (maps([3], [2], seed=seed)[0] for seed in (1, 2))
    difference = student - teacher
    pooled = difference.mean((2, 3)).square().mean()
    expected = (difference.square().mean() + pooled / 2) / 1.5
    torch.testing.assert_close(HCLLoss()(student, teacher), expected)


def test_a_pooled_vector_is_a_1x1_map():
    student, teacher = (maps([6], [1], seed=seed)[0] for seed in (1, 2))
    expected = F.mse_loss(student, teacher)
    torch.testing.assert_close(HCLLoss()(student, teacher.flatten(1)), expected)
    torch.testing.assert_close(HCLLoss()(student.flatten(1), teacher.flatten(1)), expected)


class TestHCLLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return HCLLoss()

    def tensors(self, batch):
        return {
            "student_features": torch.randn(batch, 3, 8, 8),
            "teacher_features": torch.randn(batch, 3, 8, 8),
        }


def test_bfloat16_is_within_one_percent():
    students, teachers = maps(IN_CHANNELS, seed=1), maps(IN_CHANNELS, seed=2)
    loss = HCLLoss()([s.bfloat16() for s in students], [t.bfloat16() for t in teachers])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(HCLLoss()(students, teachers).item(), rel=0.01)


def test_maps_of_another_size_are_refused_with_what_to_do():
    message = r"student \(2, 3, 8, 8\) and teacher \(2, 3, 4, 4\).*`like` of ReviewFusion"
    with pytest.raises(ValueError, match=message):
        HCLLoss()(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4))


def normed(x, norm):
    """Normalise by the batch as a batch norm in training mode does."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), False, keepdim=True)
    weight, bias = (p[None, :, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def fused_by_hand(module, features, targets):
    """Return the maps deep to shallow, by the definition, resizing by index."""
    outputs, residual = [], None
    for level in reversed(range(len(features))):
        layers, x = module.layers[level], features[level]
        x = normed(
            torch.einsum("oi,bihw->bohw", layers.reduce[0].weight[:, :, 0, 0], x), layers.reduce[1]
        )
        if residual is not None:
            residual = nearest(residual, x.shape[2])
            convolution = layers.attention[0]
            attention = torch.einsum(
                "oi,bihw->bohw", convolution.weight[:, :, 0, 0], torch.cat([x, residual], 1)
            )
            attention = torch.sigmoid(attention + convolution.bias[None, :, None, None])
            x = x * attention[:, :1] + residual * attention[:, 1:]
        residual = nearest(x, targets[level].shape[2])
        output = F.conv2d(residual, layers.expand[0].weight, padding=1)
        outputs.insert(0, normed(output, layers.expand[1]))
    return outputs


def nearest(x, size):
    index = torch.arange(size) * x.shape[2] // size
    return x[:, :, index][:, :, :, index]


@pytest.mark.parametrize("sizes", [[8, 4, 1], [16, 4, 2], [4, 4, 1], [6, 6, 3]])
def test_fusion_equals_the_definition_written_out(sizes):
    module = fusion(mid_channels=5).double()
    features = maps(IN_CHANNELS, seed=1, dtype=torch.float64)
    like = maps(OUT_CHANNELS, sizes, seed=2, dtype=torch.float64)
    expected = fused_by_hand(module, features, like)
    for output, wanted, target in zip(module(features, like), expected, like, strict=True):
        assert output.shape == target.shape
        torch.testing.assert_close(output, wanted)


def test_without_like_maps_keep_the_students_sizes():
    features = maps(IN_CHANNELS)
    outputs = fusion()(features)
    assert [o.shape[1] for o in outputs] == OUT_CHANNELS
    assert [o.shape[2:] for o in outputs] == [f.shape[2:] for f in features]


def test_a_shallow_level_reviews_deeper_ones_and_not_the_reverse():
    module, features = fusion().eval(), maps(IN_CHANNELS)
    changed = [features[0], features[1] + 1, features[2]]
    before, after = module(features), module(changed)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [True, True, False]


def test_the_deepest_level_has_no_attention_and_the_others_have():
    assert [level.attention is None for level in fusion().layers] == [False, False, True]


@pytest.mark.parametrize(("deepest", "mid"), [(6, 6), (700, 512)])
def test_mid_channels_are_the_deepest_levels_at_most_512(deepest, mid):
    module = ReviewFusion([3, deepest], [3, 4])
    assert [level.reduce[0].out_channels for level in module.layers] == [mid, mid]


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1, 1)])
def test_a_pooled_vector_may_be_the_deepest_level(shape):
    features = [*maps([3, 4], [8, 4]), torch.randn(shape)]
    module = ReviewFusion(mid_channels=5)
    module.setup(features, features)
    outputs = module(features, features)
    assert [tuple(o.shape) for o in outputs] == [(2, 3, 8, 8), (2, 4, 4, 4), (2, 6, 1, 1)]
    assert HCLLoss()(outputs, features).isfinite()


def test_setup_finds_what_the_constructor_may_be_given():
    module = ReviewFusion()
    torch.manual_seed(0)
    module.setup(maps(IN_CHANNELS), maps(OUT_CHANNELS))
    explicit, found = fusion().state_dict(), module.state_dict()
    assert list(found) == list(explicit)
    assert all(torch.equal(found[name], explicit[name]) for name in explicit)


def test_loaded_weights_give_the_same_maps():
    module, other, features = fusion(seed=0).eval(), fusion(seed=1).eval(), maps(IN_CHANNELS)
    other.load_state_dict(module.state_dict())
    for mine, theirs in zip(module(features), other(features), strict=True):
        assert torch.equal(mine, theirs)


def test_every_weight_gets_a_gradient():
    module, features, like = fusion(), maps(IN_CHANNELS), maps(OUT_CHANNELS, seed=3)
    HCLLoss()(module(features, like), like).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_convolutions_start_uniform_with_the_published_bound():
    module = ReviewFusion([512], [256])
    for convolution in (module.layers[0].reduce[0], module.layers[0].expand[0]):
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is None
        bound = (3 / convolution.weight[0].numel()) ** 0.5
        assert bound * 0.99 < convolution.weight.abs().max() <= bound


def test_channels_that_do_not_fit_are_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"in_channels is \[3, 4, 6\].*\(2, 9, 8, 8\)"):
        fusion().setup(maps([9, 4, 6]), maps(OUT_CHANNELS))
    with pytest.raises(ValueError, match=r"`like`"):
        ReviewFusion().setup(maps(IN_CHANNELS))
    with pytest.raises(ValueError, match="one number for each layer"):
        ReviewFusion([3, 4], [5])


def test_a_forward_before_setup_says_what_is_missing():
    with pytest.raises(RuntimeError, match="ReviewFusion has no layers yet"):
        ReviewFusion()(maps(IN_CHANNELS))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReviewFusion(mid_channels=0), "ReviewFusion: mid_channels .* got 0"),
        (lambda: HCLLoss([4, 0]), r"HCLLoss: output_sizes .* got \[4, 0\]"),
    ],
)
def test_a_parameter_out_of_range_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
