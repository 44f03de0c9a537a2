"""LogitL2Loss: its three divisors, and logits in units of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_kd import KDLoss
from distill_kd.l2 import LogitL2Loss


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "divisors"),
    [
        ((3, 5), {"mean": 15, "positionmean": 3, "batchmean": 3}),
        ((2, 5, 3, 4), {"mean": 120, "positionmean": 24, "batchmean": 2}),
        ((2, 7, 5), {"mean": 70, "positionmean": 14, "batchmean": 2}),
    ],
)
def test_equals_the_sum_of_squares_over_what_its_name_says(shape, divisors):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    total = sum((s - t) ** 2 for s, t in pairs)
    for reduction, divisor in divisors.items():
        loss = LogitL2Loss(reduction)(student, teacher)
        assert loss.item() == pytest.approx(total / divisor, rel=1e-12)


def test_the_default_is_the_mean_squared_error():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    torch.testing.assert_close(LogitL2Loss()(student, teacher), F.mse_loss(student, teacher))


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 5 * 4), ("positionmean", 5)])
def test_ignored_positions_leave_the_divisor(reduction, divisor):
    student, teacher = logits(2, 3, 4, seed=1), logits(2, 3, 4, seed=2)
    targets = torch.zeros(2, 3, dtype=torch.int64)
    targets[0, 1] = -100
    loss = LogitL2Loss(reduction)(student, teacher, targets)
    total = (student - teacher)[targets == 0].square().sum()
    torch.testing.assert_close(loss, total / divisor)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "positionmean", "batchmean"])
def test_gradient_equals_finite_differences(reduction, standardize):
    student, teacher = logits(2, 3, 5, seed=3).requires_grad_(), logits(2, 3, 5, seed=4)
    loss = LogitL2Loss(reduction, standardize=standardize)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("standardize", [False, True])
def test_identical_logits_give_exactly_zero_and_no_gradient(standardize):
    student = logits(5, 6, dtype=torch.float32).requires_grad_()
    loss = LogitL2Loss(standardize=standardize)(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


def test_standardised_logits_do_not_tell_their_mean_and_size():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    loss = LogitL2Loss(standardize=True)
    expected = loss(student, teacher)
    moved = loss(3 * student + 1, 0.2 * teacher - 5)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(F.mse_loss(*z), expected, rtol=1e-5, atol=0)


def test_it_is_what_kd_becomes_at_a_high_temperature():
    student, teacher = logits(4, 6, seed=1), logits(4, 6, seed=2)
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    kd = KDLoss(temperature=1e4, alpha=0.0)(student, teacher)
    assert kd.item() == pytest.approx(LogitL2Loss()(*centred).item() / 2, rel=1e-3)


def test_a_class_that_the_teacher_excludes_has_no_distance():
    student, teacher = logits(3, 5, seed=1).requires_grad_(), logits(3, 5, seed=2)
    teacher[:, 4] = -math.inf
    loss = LogitL2Loss("positionmean")(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, LogitL2Loss("positionmean")(student[:, :4], teacher[:, :4]))
    assert gradient[:, 4].eq(0).all()


class TestLogitL2Loss(LossConformance):
    teacher = "teacher"

    def make(self):
        return LogitL2Loss()

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}
