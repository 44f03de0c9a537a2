"""SPKDLoss: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

import pytest
import torch

from distill.testing import LossConformance
from distill_relational import SPKDLoss

METHOD = "spkd"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def similarities(rows, p):
    products = [[sum(map(float.__mul__, a, b)) for b in rows] for a in rows]
    norms = [sum(abs(value) ** p for value in row) ** (1 / p) for row in products]
    return [[v / max(norm, 1e-12) for v in row] for row, norm in zip(products, norms, strict=True)]


def by_hand(student, teacher, p):
    sides = (similarities(side.flatten(1).tolist(), p) for side in (student, teacher))
    rows = zip(*sides, strict=True)
    return sum((s - t) ** 2 for pair in rows for s, t in zip(*pair, strict=True))


class TestSPKDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return SPKDLoss()

    def tensors(self, batch):
        return {n: torch.randn(batch, 3, 2, 2) for n in ("student_features", "teacher_features")}


class TestSPKDLossOfSums(TestSPKDLoss):
    def make(self):
        return SPKDLoss(p=1)


def test_loss_and_gradients_equal_the_reference(reference):
    features = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    p = {"l2_rows": 2, "l1_rows": 1}[reference.variant]
    reference.check(SPKDLoss(p, **reference.params)(*features))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_equals_the_formula_written_out(p, reduction):
    student, teacher = draw(5, 3, 2, 2, seed=1), draw(5, 7, 3, 1, seed=2)
    expected = by_hand(student, teacher, p) / {"batchmean": 25, "sum": 1}[reduction]
    assert SPKDLoss(p, reduction)(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_identical_features_give_0_whatever_their_scale():
    student = draw(5, 4).requires_grad_()
    loss = SPKDLoss()(student, 2 * student.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-7


def test_a_sample_of_zeros_is_like_none_and_gets_no_gradient_of_its_row():
    student, teacher = draw(4, 6, seed=1), draw(4, 6, seed=2)
    student[2] = 0
    student.requires_grad_()
    loss = SPKDLoss()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(student.detach(), teacher, 2) / 16)
    assert student.grad.abs().max() < 10


def test_a_single_sample_gives_0():
    student = draw(1, 4).requires_grad_()
    loss = SPKDLoss()(student, draw(1, 6, seed=1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)


def test_half_precision_is_within_a_percent():
    student, teacher = draw(16, 8, seed=1), draw(16, 8, seed=2)
    rounded = SPKDLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(SPKDLoss()(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"p": 3}, "SPKDLoss: p must be 1 or 2, got 3"),
        ({"reduction": "mean"}, "SPKDLoss: reduction must be one of 'batchmean', 'sum', got"),
        ({"gather": "some"}, "SPKDLoss: gather must be one of 'none', 'all', got 'some'"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        SPKDLoss(**params)


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"SPKDLoss: student \(2, 3\) and teacher \(4, 3\) must"):
        SPKDLoss()(torch.zeros(2, 3), torch.zeros(4, 3))


def test_printing_shows_every_parameter():
    assert repr(SPKDLoss()) == "SPKDLoss(p=2, reduction='batchmean', gather='none')"
