"""CWDLoss: the formula written out, invariances, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.channel_wise import CWDLoss


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def softmax(values, temperature):
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def by_hand(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        ours = softmax(s.flatten().tolist(), temperature)
        theirs = softmax(t.flatten().tolist(), temperature)
        total += sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))
    return total * temperature**2 / (student.shape[0] * student.shape[1])


class TestCWDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return CWDLoss()

    def tensors(self, batch):
        shape = (batch, 3, 2, 4)
        return {"student_features": torch.randn(shape), "teacher_features": torch.randn(shape)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_formula_written_out(temperature):
    students = [draw(2, 3, 4, 5, seed=1), draw(2, 6, 2, 2, seed=2)]
    teachers = [draw(2, 3, 4, 5, seed=3), draw(2, 6, 2, 2, seed=4)]
    loss = CWDLoss(temperature)(students, teachers)
    pairs = zip(students, teachers, strict=True)
    expected = sum(by_hand(*pair, temperature) for pair in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_identical_maps_give_exactly_zero():
    student = draw(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    loss = CWDLoss()(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() < 1e-7


def test_adding_a_constant_to_a_channel_changes_nothing():
    student, teacher = draw(2, 3, 4, 5, seed=1), draw(2, 3, 4, 5, seed=2)
    shift = torch.tensor([100.0, -7.0, 3.0]).view(3, 1, 1)
    torch.testing.assert_close(
        CWDLoss()(student + shift, teacher - shift), CWDLoss()(student, teacher)
    )


def test_copies_of_samples_and_channels_change_nothing():
    student, teacher = draw(2, 3, 4, 5, seed=1), draw(2, 3, 4, 5, seed=2)
    more = CWDLoss()(student.repeat(3, 2, 1, 1), teacher.repeat(3, 2, 1, 1))
    torch.testing.assert_close(more, CWDLoss()(student, teacher))


@pytest.mark.parametrize("size", [(2, 3), (9, 7), (4, 10)])
def test_a_map_of_another_size_is_interpolated_to_the_teachers(size):
    student, teacher = draw(2, 3, *size, seed=1), draw(2, 3, 4, 5, seed=2)
    resized = F.interpolate(student, (4, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(CWDLoss()(student, teacher), CWDLoss()(resized, teacher))


def test_half_precision_is_within_a_percent():
    student, teacher = 4 * draw(4, 8, 6, 6, seed=1), 4 * draw(4, 8, 6, 6, seed=2)
    rounded = CWDLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(CWDLoss()(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_named(temperature):
    with pytest.raises(ValueError, match="CWDLoss: temperature must be a finite number > 0, got"):
        CWDLoss(temperature)


def test_maps_of_different_channels_are_refused_with_what_to_do():
    message = r"student \(2, 3, 4, 4\) and teacher \(2, 5, 4, 4\).*1x1 Conv2d.*`adapter: auto`"
    with pytest.raises(ValueError, match=message):
        CWDLoss()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))


def test_features_that_are_no_maps_are_refused():
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 3\) must be maps"):
        CWDLoss()(torch.zeros(2, 3), torch.zeros(2, 3))


def test_printing_shows_the_temperature():
    assert repr(CWDLoss(2.0)) == "CWDLoss(temperature=2.0)"
