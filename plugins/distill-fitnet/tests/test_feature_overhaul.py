"""OFDLoss and OFDConnector: margins by integration, the distance written out, layers and scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.testing import LossConformance
from distill_fitnet.feature_overhaul import OFDConnector, OFDLoss, negative_mean


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def margin_by_integration(weight, bias, steps=200_000):
    """Return E[x | x < 0] of a normal distribution, by the midpoint rule."""
    deviation = abs(weight)
    low = min(bias, 0.0) - 12 * deviation
    x = low - low / steps * (torch.arange(steps, dtype=torch.float64) + 0.5)
    density = torch.exp(-(((x - bias) / deviation) ** 2) / 2)
    return (x * density).sum().item() / density.sum().item()


@pytest.mark.parametrize(
    ("weight", "bias"), [(1.0, 0.0), (0.7, -0.4), (-0.7, -0.4), (0.2, 0.5), (2.0, -30.0)]
)
def test_the_margin_is_the_mean_negative_response(weight, bias):
    margin = negative_mean(*torch.tensor([[weight], [bias]], dtype=torch.float64))
    assert margin.item() == pytest.approx(margin_by_integration(weight, bias), rel=1e-7)


@pytest.mark.parametrize(("ratio", "rare"), [(3.09, False), (3.0903, True), (40.0, True)])
def test_where_negatives_are_rare_the_margin_is_minus_three_deviations(ratio, rare):
    weight = torch.tensor([0.5, -0.5], dtype=torch.float64)
    margin = negative_mean(weight, weight.abs() * ratio)
    assert (0.5 * math.erfc(ratio / math.sqrt(2)) > 0.001) is not rare
    assert margin.eq(-1.5).all().item() is rare


@pytest.mark.parametrize(("bias", "margin"), [(-2.0, -2.0), (0.0, 0.0), (2.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_channel_without_variance_has_its_bias_as_margin(bias, margin, dtype):
    given = negative_mean(torch.zeros(1, dtype=dtype), torch.tensor([bias], dtype=dtype))
    assert given.item() == pytest.approx(margin, abs=1e-30)


def loss_by_hand(student, teacher, weights, biases, scale):
    """Return the loss with one branch for each way in which the three may lie."""
    total, layers = 0.0, len(student)
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        margins = [
            margin_by_integration(w, b)
            for w, b in zip(weights[index].tolist(), biases[index].tolist(), strict=True)
        ]
        distance = 0.0
        for b, c, i in torch.cartesian_prod(*map(torch.arange, s.flatten(2).shape)).tolist():
            x, y, m = s.flatten(2)[b, c, i].item(), t.flatten(2)[b, c, i].item(), margins[c]
            if y > 0 or (m < y <= 0 and x > y):
                distance += (x - y) ** 2
            elif y <= m and x > m:
                distance += (x - m) ** 2
        total += distance / 2 ** (layers - 1 - index)
    return scale * total / len(student[0])


@pytest.mark.parametrize("scale", [1e-3, 0.5])
def test_equals_the_formula_written_out(scale):
    shapes = [(3, 4, 5, 2), (3, 6, 2, 2), (3, 2, 1, 1)]
    student, teacher = ([randn(*shape, seed=n) for shape in shapes] for n in (1, 2))
    # Negative responses are common, so that margins are means and not the special case.
    signs = [randn(shape[1], seed=3).sign() for shape in shapes]
    weights = [sign * (0.5 + randn(len(sign), seed=5).abs()) for sign in signs]
    biases = [randn(shape[1], seed=4) * 0.3 for shape in shapes]
    expected = loss_by_hand(student, teacher, weights, biases, scale)
    loss = OFDLoss(scale)(student, teacher, weights, biases)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "distance"),
    [
        (-2.0, -0.5, 0.0),  # both negative, the student more so
        (-2.0, -9.0, 0.0),  # likewise, the teacher at its margin
        (-0.2, -0.5, 0.09),  # the student less negative
        (0.3, -9.0, (0.3 + math.sqrt(2 / math.pi)) ** 2),  # down to the margin only
        (-2.0, 0.5, 6.25),  # the teacher responds
        (2.0, 0.5, 2.25),
        (-1.0, 0.0, 0.0),
    ],
)
def test_only_what_a_relu_lets_through_or_should_not_counts(student, teacher, distance):
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    weight, bias = torch.ones(1).double(), torch.zeros(1).double()
    loss = OFDLoss(1.0)(student * one, teacher * one, weight, bias)
    assert loss.item() == pytest.approx(distance)


def test_each_layer_counts_twice_as_much_as_the_one_before():
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    norm = torch.ones(3), torch.zeros(3)
    single = OFDLoss()(student, teacher, *norm)
    thrice = OFDLoss()([student] * 3, [teacher] * 3, [norm[0]] * 3, [norm[1]] * 3)
    torch.testing.assert_close(thrice, 1.75 * single)


class TestOFDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return OFDLoss()

    def tensors(self, batch):
        return {
            "student_features": torch.randn(batch, 3, 4, 4),
            "teacher_features": torch.randn(batch, 3, 4, 4),
            "bn_weight": torch.randn(3),
            "bn_bias": torch.randn(3),
        }


def test_bfloat16_is_within_one_percent():
    given = [randn(4, 6, 5, 5), randn(4, 6, 5, 5, seed=1), randn(6, seed=2), randn(6, seed=3)]
    loss = OFDLoss()(*(tensor.bfloat16() for tensor in given))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(OFDLoss()(*given).item(), rel=0.01)


def test_the_teachers_batch_norm_gets_no_gradient():
    norm, student = nn.BatchNorm2d(3), randn(2, 3, 4, 4).requires_grad_()
    OFDLoss()(student, randn(2, 3, 4, 4, seed=1), norm.weight, norm.bias).backward()
    assert student.grad is not None
    assert norm.weight.grad is None
    assert norm.bias.grad is None


def test_what_does_not_fit_is_refused_with_the_shapes():
    norm, x = (torch.ones(3), torch.zeros(3)), randn(2, 3, 4, 4)
    message = r"student \(2, 5, 4, 4\) and teacher \(2, 3, 4, 4\).*OFDConnector"
    with pytest.raises(ValueError, match=message):
        OFDLoss()(randn(2, 5, 4, 4), x, *norm)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) needs .*\(3,\), got \(4,\) and \(3,\)"):
        OFDLoss()(x, x, torch.ones(4), norm[1])
    with pytest.raises(ValueError, match=r"2 features need as many .*, got 1 and 2"):
        OFDLoss()([x, x], [x, x], norm[0], [norm[1]] * 2)


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
def test_a_scale_out_of_range_is_named(scale):
    with pytest.raises(ValueError, match="OFDLoss: scale must be a finite number >= 0, got"):
        OFDLoss(scale)


def connector(seed=0):
    torch.manual_seed(seed)
    return OFDConnector([3, 4], [5, 4])


def features(dtype=torch.float32):
    return [randn(2, 3, 4, 4, dtype=dtype), randn(2, 4, 2, 2, dtype=dtype)]


def test_the_connector_is_a_convolution_and_a_batch_norm_for_each_layer():
    module, given = connector().double(), features(torch.float64)
    for layer, x, output in zip(module.layers, given, module(given), strict=True):
        convolution, norm = layer
        assert convolution.bias is None
        y = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], x)
        y = y - y.mean((0, 2, 3), keepdim=True)
        expected = y / (y.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
        torch.testing.assert_close(output, expected)


def test_setup_finds_what_the_constructor_may_be_given():
    module = OFDConnector()
    torch.manual_seed(0)
    module.setup(features(), [randn(2, 5, 4, 4), randn(2, 4, 2, 2)])
    explicit, found = connector().state_dict(), module.state_dict()
    assert list(found) == list(explicit)
    assert all(torch.equal(found[name], explicit[name]) for name in explicit)


def test_loaded_weights_give_the_same_maps():
    module, other = connector(0).eval(), connector(1).eval()
    other.load_state_dict(module.state_dict())
    for mine, theirs in zip(module(features()), other(features()), strict=True):
        assert torch.equal(mine, theirs)


def test_the_connectors_weights_start_as_published():
    weight = OFDConnector(128, 256).layers[0][0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)


def test_channels_that_do_not_fit_the_connector_are_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"OFDConnector: in_channels is \[3, 4\].*\(2, 9, 4, 4\)"):
        connector().setup([randn(2, 9, 4, 4), randn(2, 4, 2, 2)])
    with pytest.raises(RuntimeError, match="OFDConnector has no layers yet"):
        OFDConnector()(features())
