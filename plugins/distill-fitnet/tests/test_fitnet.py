"""HintLoss and ConvRegressor: reference numbers, formulas by hand, shapes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.fitnet import ConvRegressor, HintLoss

METHOD = "fitnet"


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(*args, **params):
    torch.manual_seed(0)
    return ConvRegressor(*args, **params)


def test_equals_the_reference_numbers(reference):
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    loss = HintLoss(reference.params.get("reduction", "mean"))
    if reference.variant == "conv_bn_relu":
        params = reference.params
        regressor = ConvRegressor(kernel_size=params["kernel_size"], relu=params["uses_relu"])
        regressor.setup(student, teacher)
        names = {
            n: n.replace("conv", "layers.0.project").replace("bn", "layers.0.norm") for n in NAMES
        }
        reference.load("regressor", regressor, names)
        student = regressor(student, teacher)
    elif reference.variant == "conv1x1":
        regressor = ConvRegressor(kernel_size=1, batch_norm=False, relu=False, bias=False)
        regressor.setup(student, teacher)
        reference.load("regressor", regressor, {"weight": "layers.0.project.weight"})
        student = regressor(student, teacher)
    reference.check(loss(student, teacher))


NAMES = [
    *("conv.weight", "conv.bias", "bn.weight", "bn.bias"),
    *("bn.running_mean", "bn.running_var"),
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "paper"])
@pytest.mark.parametrize("weights", [None, [0.5, 3.0]])
def test_hint_loss_equals_the_formula_written_out(reduction, weights):
    students = [maps(3, 2, 2, 3, seed=1), maps(3, 5, seed=2)]
    teachers = [maps(3, 2, 2, 3, seed=3), maps(3, 5, seed=4)]
    expected = 0.0
    for student, teacher, w in zip(students, teachers, weights or [1, 1], strict=True):
        values = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
        total = sum((s - t) ** 2 for s, t in values)
        expected += w * total / {"mean": student.numel(), "sum": 1, "paper": 2 * 3}[reduction]
    loss = HintLoss(reduction, weights)(students, teachers)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


class TestHintLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return HintLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 3, 4, 4) for name in (self.student, self.teacher)}


class TestHintLossOfThePaper(TestHintLoss):
    def make(self):
        return HintLoss("paper")


def test_hint_loss_of_bfloat16_is_near_that_of_float32():
    student, teacher = maps(4, 3, 4, 4).float(), maps(4, 3, 4, 4, seed=1).float()
    rounded = HintLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(HintLoss()(student, teacher).item(), rel=0.01)


SHAPES = [
    ((3, 8, 8), (5, 4, 4), nn.Conv2d, (3, 3)),
    ((3, 4, 4), (5, 8, 8), nn.ConvTranspose2d, (4, 4)),
    ((3, 8, 16), (5, 4, 8), nn.Conv2d, (3, 3)),
    ((3, 4, 4), (5, 4, 4), nn.Conv2d, (1, 1)),
    ((3, 7, 7), (5, 5, 5), nn.Conv2d, (3, 3)),
    ((3, 9, 6), (5, 3, 5), nn.Conv2d, (7, 2)),
    ((3, 2, 2), (5, 7, 7), nn.Conv2d, (1, 1)),
    ((3, 7, 7), (5, 28, 28), nn.Conv2d, (1, 1)),
    ((3, 4, 8), (5, 8, 8), nn.Conv2d, (1, 1)),
    ((3, 9, 4), (5, 6, 5), nn.Conv2d, (1, 1)),
    ((6,), (9,), nn.Linear, None),
]


@pytest.mark.parametrize(("given", "wanted", "kind", "kernel"), SHAPES)
def test_any_shape_is_brought_to_any_other(given, wanted, kind, kernel):
    features, like = maps(2, *given).float(), maps(2, *wanted).float()
    regressor = seeded()
    regressor.setup(features, like)
    assert regressor(features, like).shape == like.shape
    assert type(regressor.layers[0].project) is kind
    assert getattr(regressor.layers[0].project, "kernel_size", None) == kernel


@pytest.mark.parametrize(("given", "wanted"), [case[:2] for case in SHAPES])
def test_given_shapes_make_the_same_regressor_as_shapes_found(given, wanted):
    features, like = maps(2, *given).float(), maps(2, *wanted).float()
    found = seeded()
    found.setup(features, like)
    explicit = seeded(given[0], wanted[0], list(given[1:]), list(wanted[1:]))
    torch.testing.assert_close(explicit(features), found(features, like), rtol=0, atol=0)
    explicit.setup(features, like)
    torch.testing.assert_close(explicit(features, like), found(features, like), rtol=0, atol=0)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_a_kernel_size_replaces_the_rule(kernel_size):
    features, like = maps(2, 3, 8, 8).float(), maps(2, 5, 6, 6, seed=1).float()
    regressor = ConvRegressor(3, 5, kernel_size=kernel_size, batch_norm=False, relu=False)
    weight, bias = regressor.layers[0].project.weight, regressor.layers[0].project.bias
    expected = F.conv2d(features, weight, bias, padding=kernel_size // 2)
    torch.testing.assert_close(regressor(features), expected)
    resized = F.interpolate(expected, (6, 6), mode="bilinear")
    torch.testing.assert_close(regressor(features, like), resized)


@pytest.mark.parametrize("shape", [(4, 3, 4, 4), (4, 3)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_batch_norm_and_relu_follow_as_asked_for(shape, batch_norm, relu):
    features = maps(*shape)
    regressor = seeded(out_channels=5, batch_norm=batch_norm, relu=relu)
    regressor.setup(features)
    expected = regressor.layers[0].project(features)
    if batch_norm:
        expected = F.batch_norm(expected, None, None, training=True)
    if relu:
        expected = expected.clamp(min=0)
    torch.testing.assert_close(regressor(features), expected)


def test_maps_of_another_size_than_the_first_are_interpolated():
    regressor = ConvRegressor()
    regressor.setup(maps(2, 3, 8, 8), maps(2, 5, 4, 4))
    assert regressor(maps(2, 3, 9, 9), maps(2, 5, 4, 4)).shape == (2, 5, 4, 4)


def test_state_of_one_regressor_makes_another_the_same():
    features, like = maps(2, 3, 8, 8).float(), maps(2, 5, 4, 4).float()
    first, second = ConvRegressor(), ConvRegressor()
    first.setup(features, like)
    first(features, like)
    second.setup(features, like)
    second.load_state_dict(first.state_dict())
    expected = first.eval()(features, like)
    torch.testing.assert_close(second.eval()(features, like), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "placed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_parameters_are_float32_unless_features_are_float64(dtype, placed):
    features = maps(2, 3, 4, 4).to(dtype)
    regressor = ConvRegressor(out_channels=5)
    regressor.setup(features)
    assert regressor.layers[0].project.weight.dtype == placed
    assert regressor(features).dtype == placed


def test_a_regressor_without_shapes_says_that_it_has_none():
    with pytest.raises(RuntimeError, match=r"ConvRegressor has no layers yet: call setup"):
        ConvRegressor(in_channels=3)(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"in_channels": 0}, r"in_channels must be a whole number >= 1, .* got 0"),
        ({"out_channels": -1}, r"out_channels must be .* got -1"),
        ({"in_size": [4]}, r"in_size must be \[height, width\], .* got \[4\]"),
        ({"out_size": [4, 0]}, r"out_size must be .* got \[4, 0\]"),
        ({"kernel_size": 2}, r"kernel_size must be an odd number > 0, or None, got 2"),
        ({"kernel_size": -1}, r"kernel_size must be .* got -1"),
    ],
)
def test_a_parameter_of_the_regressor_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=rf"ConvRegressor: {message}"):
        ConvRegressor(**params)


@pytest.mark.parametrize(
    ("params", "given", "wanted", "message"),
    [
        ({"in_channels": 4}, (2, 3, 4, 4), (2, 5, 4, 4), r"in_channels is \[4\].*4\) have \[3\]"),
        ({"out_channels": 6}, (2, 3, 4, 4), (2, 5, 4, 4), r"out_channels is \[6\].*4\) have \[5\]"),
        ({"in_size": [8, 8]}, (2, 3, 4, 4), (2, 5, 4, 4), r"in_size is \[8, 8\].*have \[4, 4\]"),
        ({"out_size": [8, 8]}, (2, 3, 4, 4), (2, 5, 4, 4), r"out_size is \[8, 8\].*have \[4, 4\]"),
        ({}, (2, 3, 4, 4), None, r"give out_channels, or wire .* `like`"),
        ({}, (2, 3, 4), (2, 5, 4, 4), r"features must be vectors .* or maps .* got \(2, 3, 4\)"),
        ({"kernel_size": 3}, (2, 3), (2, 5), r"features must be maps .* got \(2, 3\)"),
        ({}, (2, 3, 4, 4), (2,), r"features must be vectors .* got \(2,\)"),
    ],
)
def test_features_that_do_not_fit_the_regressor_are_refused(params, given, wanted, message):
    like = None if wanted is None else maps(*wanted)
    with pytest.raises(ValueError, match=rf"ConvRegressor: .*{message}"):
        ConvRegressor(**params).setup(maps(*given), like)


def test_a_regressor_takes_one_layer_only():
    with pytest.raises(ValueError, match=r"features must be of one layer, got a list"):
        ConvRegressor().setup([maps(2, 3, 4, 4)])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"reduction": "none"}, r"reduction must be one of 'mean', 'sum', 'paper', got 'none'"),
        ({"layer_weights": [1.0, -1.0]}, r"layer_weights must be finite .* got \[1\.0, -1\.0\]"),
        ({"layer_weights": [math.nan]}, r"layer_weights must be .* got \[nan\]"),
    ],
)
def test_a_parameter_of_the_loss_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=rf"HintLoss: {message}"):
        HintLoss(**params)


def test_features_of_different_shapes_are_refused_with_a_remedy():
    message = r"student \(2, 3, 4, 4\) and teacher \(2, 5, 4, 4\) .* a ConvRegressor"
    with pytest.raises(ValueError, match=message):
        HintLoss()(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


PLAIN = {"batch_norm": False, "relu": False}


def test_a_map_becomes_a_vector_by_its_mean_and_a_linear_layer():
    features, like = torch.randn(3, 4, 5, 6), torch.randn(3, 7)
    regressor = ConvRegressor(**PLAIN)
    regressor.setup(features, like)
    weight, bias = regressor.parameters()
    expected = features.mean((2, 3)) @ weight.T + bias
    torch.testing.assert_close(regressor(features, like), expected)


def test_a_vector_becomes_a_map_that_is_the_same_everywhere():
    features, like = torch.randn(3, 4), torch.randn(3, 7, 5, 6)
    regressor = ConvRegressor(**PLAIN)
    regressor.setup(features, like)
    weight, bias = regressor.parameters()
    expected = (features @ weight.T + bias)[:, :, None, None].expand(3, 7, 5, 6)
    torch.testing.assert_close(regressor(features, like), expected)


def test_maps_and_vectors_are_normalised_in_the_form_that_comes_out():
    vector, features = torch.randn(8, 7), torch.randn(8, 4, 5, 6)
    for given, like in ((features, vector), (vector, features)):
        regressor = ConvRegressor()
        regressor.setup(given, like)
        out = regressor(given, like)
        assert out.shape == like.shape
        assert out.min() == 0
