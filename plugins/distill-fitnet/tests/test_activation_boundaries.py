"""ABLoss and ABConnector: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from distill.testing import LossConformance
from distill_fitnet.activation_boundaries import ABConnector, ABLoss

METHOD = "dab"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(student, teacher, margin):
    """Return the summed loss, element by element, as the authors write the four cases."""
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
    return total


class TestABLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return ABLoss()

    def tensors(self, batch):
        shape = (batch, 3, 2, 2)
        return {"student_features": torch.randn(shape), "teacher_features": torch.randn(shape)}


def test_loss_and_gradients_equal_the_reference(reference):
    params = reference.params
    # The reference names the mean over samples "mean", and weighs by nothing but its weights.
    loss = ABLoss(params["margin"], scale=1.0, layer_weights=params.get("weights", [1.0]))
    assert params["reduction"] == "mean"
    if reference.variant == "default":
        reference.check(
            loss(reference.tensor("student_feature_0"), reference.tensor("teacher_feature_0"))
        )
        return
    connector = ABConnector()
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    connector.setup(student, teacher)
    names = list(reference.state("connector"))
    reference.load("connector", connector, {name: f"layers.0.{name}" for name in names})
    reference.check(loss(connector(student), teacher))


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [0.5, 0.0, 3.0]])
@pytest.mark.parametrize(("margin", "scale"), [(1.0, 0.003), (0.3, 1.0), (2.5, 2.0)])
def test_equals_the_formula_written_out(margin, scale, weights, reduction):
    shapes = [(3, 2, 4, 5), (3, 7, 2, 2), (3, 6)]
    students = [draw(*shape, seed=number) for number, shape in enumerate(shapes)]
    teachers = [draw(*shape, seed=number + 5) for number, shape in enumerate(shapes)]
    teachers[1][0] = 0.0  # a neuron at exactly 0 counts as inactive

    loss = ABLoss(margin, scale, weights, reduction)(students, teachers)

    each = [by_hand(s, t, margin) for s, t in zip(students, teachers, strict=True)]
    weighed = sum(w * e for w, e in zip(weights or [0.25, 0.5, 1.0], each, strict=True))
    expected = scale * weighed / (3 if reduction == "batchmean" else 1)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_beyond_the_margin_on_the_teachers_side_costs_nothing():
    teacher = torch.tensor([[2.0, -3.0, 0.1, 0.0]])
    student = torch.tensor([[1.0, -1.0, 5.0, -1.5]], requires_grad=True)
    loss = ABLoss(margin=1.0)(student, teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert not student.grad.any()


def test_half_precision_is_within_a_percent():
    student, teacher = draw(4, 8, 3, 3, seed=1), draw(4, 8, 3, 3, seed=2)
    rounded = ABLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(ABLoss()(student, teacher).item(), rel=0.01)


def test_the_connector_is_a_convolution_and_a_batch_norm():
    student = draw(4, 3, 5, 2, seed=1)
    connector = ABConnector(3, 6)
    connector.setup(student, draw(4, 6, 5, 2))
    plain = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 6, 1, bias=False), bn=nn.BatchNorm2d(6))
    ).double()
    state = connector.state_dict().items()
    plain.load_state_dict({name.removeprefix("layers.0."): value for name, value in state})
    torch.testing.assert_close(connector(student), plain(student))


def test_the_connector_starts_with_the_authors_variance():
    torch.manual_seed(0)
    weight = ABConnector(200, 100).layers[0].conv.weight
    assert weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"margin": 0.0}, r"ABLoss: margin must be a finite number > 0, got 0\.0"),
        ({"margin": float("inf")}, r"ABLoss: margin .* got inf"),
        ({"scale": -1.0}, r"ABLoss: scale must be a finite number > 0, got -1\.0"),
        ({"layer_weights": [1.0, -1.0]}, r"ABLoss: layer_weights .* got \[1\.0, -1\.0\]"),
        ({"reduction": "mean"}, r"ABLoss: reduction must be one of 'batchmean', 'sum'"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        ABLoss(**params)


def test_features_of_different_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"student \(2, 3, 4, 4\) and teacher \(2, 5, 4, 4\).*ABC"):
        ABLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))


def test_another_number_of_weights_than_layers_is_refused():
    features = [torch.zeros(2, 3)] * 3
    with pytest.raises(ValueError, match="layer_weights has 2 numbers for 3 layers"):
        ABLoss(layer_weights=[1.0, 1.0])(features, features)


def test_printing_shows_every_parameter():
    assert repr(ABLoss()) == (
        "ABLoss(margin=1.0, scale=0.003, layer_weights=None, reduction='batchmean')"
    )
