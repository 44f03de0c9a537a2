"""ATLoss: reference numbers, formula by hand, sizes, extremes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.attention_transfer import ATLoss

METHOD = "at"
FORMS = {"code_mse": "code", "abs_power": "code", "paper_norm": "paper"}


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention_by_hand(sample, power, absolute):
    """Return the normalised attention of one sample (C, H, W), as a list."""
    channels = sample.flatten(1).tolist()
    energy = [
        sum((abs(v) if absolute else v) ** power for v in position)
        for position in zip(*channels, strict=True)
    ]
    norm = math.sqrt(sum(e * e for e in energy))
    return [e / norm for e in energy]


def loss_by_hand(student, teacher, form, power, absolute):
    losses = []
    for s, t in zip(student, teacher, strict=True):
        pairs = zip(
            attention_by_hand(s, power, absolute),
            attention_by_hand(t, power, absolute),
            strict=True,
        )
        squares = [(q - r) ** 2 for q, r in pairs]
        losses.append(sum(squares) / len(squares) if form == "code" else math.sqrt(sum(squares)))
    return sum(losses) / len(losses)


def test_equals_the_reference_numbers(reference):
    layers = range(len(reference.params["weights"]))
    loss = ATLoss(
        FORMS[reference.variant],
        power=reference.params["p"],
        abs_power=reference.variant == "abs_power",
        layer_weights=reference.params["weights"],
    )
    students = [reference.tensor(f"student_feature_{n}") for n in layers]
    teachers = [reference.tensor(f"teacher_feature_{n}") for n in layers]
    reference.check(loss(students, teachers))


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(("power", "absolute"), [(2, False), (3, False), (3, True), (1.5, True)])
def test_equals_the_formula_written_out(form, power, absolute):
    student, teacher = maps(2, 3, 3, 5, seed=1), maps(2, 4, 3, 5, seed=2)
    loss = ATLoss(form, power, absolute)(student, teacher)
    expected = loss_by_hand(student, teacher, form, power, absolute)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_layers_are_summed_with_their_weights():
    students = [maps(2, 3, 4, 4, seed=1), maps(2, 5, 2, 2, seed=2)]
    teachers = [maps(2, 3, 4, 4, seed=3), maps(2, 6, 2, 2, seed=4)]
    one, two = (ATLoss()(s, t).item() for s, t in zip(students, teachers, strict=True))
    assert ATLoss()(students, teachers).item() == pytest.approx(one + two)
    weighted = ATLoss(layer_weights=[2.0, 0.5])(students, teachers).item()
    assert weighted == pytest.approx(2 * one + 0.5 * two)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_larger_map_is_pooled_before_its_attention(form):
    large, small = maps(2, 3, 8, 6, seed=1), maps(2, 5, 4, 3, seed=2)
    expected = loss_by_hand(F.avg_pool2d(large, 2), small, form, 2, False)
    assert ATLoss(form)(large, small).item() == pytest.approx(expected, rel=1e-12)
    assert ATLoss(form)(small, large).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_scaling_a_map_changes_nothing(form):
    student, teacher = maps(2, 3, 4, 4, seed=1), maps(2, 3, 4, 4, seed=2)
    scaled = ATLoss(form)(student * 7.0, teacher * 0.2)
    torch.testing.assert_close(scaled, ATLoss(form)(student, teacher))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_map_of_zeros_gets_a_gradient_no_larger_than_others(power):
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    ATLoss(power=power)(student, maps(2, 3, 4, 4).float()).backward()
    assert student.grad.abs().max() < 1


@pytest.mark.parametrize("form", ["code", "paper"])
def test_loss_of_bfloat16_is_near_that_of_float32(form):
    student, teacher = maps(4, 8, 6, 6).float(), maps(4, 8, 6, 6, seed=1).float()
    rounded = ATLoss(form)(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(ATLoss(form)(student, teacher).item(), rel=0.01)


class TestATLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return ATLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 3, 4, 4) for name in (self.student, self.teacher)}


class TestATLossOfThePaper(TestATLoss):
    def make(self):
        return ATLoss("paper", power=1, abs_power=True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"form": "mse"}, r"form must be one of 'code', 'paper', got 'mse'"),
        ({"power": 0.5, "abs_power": True}, r"power must be a finite number >= 1, got 0\.5"),
        ({"power": math.inf}, r"power must be .* got inf"),
        ({"power": 1.5}, r"power must be whole, since features may be negative, got 1\.5"),
        ({"layer_weights": [-1.0]}, r"layer_weights must be finite numbers >= 0.* got \[-1\.0\]"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=rf"ATLoss: {message}"):
        ATLoss(**params)


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 3)), ((2, 3, 4, 4), (1, 3, 4, 4))])
def test_features_that_are_no_maps_of_one_batch_are_refused(student, teacher):
    with pytest.raises(ValueError, match=r"ATLoss: .* must be maps \(B, C, H, W\) of the same"):
        ATLoss()(torch.ones(student), torch.ones(teacher))
