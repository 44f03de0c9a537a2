"""PKTLoss: reference numbers, the formula written out, digits in float32, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from distill.testing import LossConformance
from distill_relational import PKTLoss

METHOD = "pkt"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def probabilities(rows, eps):
    lengths = [math.sqrt(sum(value**2 for value in row)) + eps for row in rows]
    units = [[v / length for v in row] for row, length in zip(rows, lengths, strict=True)]
    similar = [[(sum(map(float.__mul__, a, b)) + 1) / 2 for b in units] for a in units]
    return [[value / sum(row) for value in row] for row in similar]


def by_hand(student, teacher, eps=1e-7):
    ours, theirs = (probabilities(side.tolist(), eps) for side in (student, teacher))
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return sum(t * math.log((t + eps) / (s + eps)) for s, t in pairs) / len(pairs)


class TestPKTLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return PKTLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 5) for name in ("student_features", "teacher_features")}


def test_loss_and_gradients_equal_the_reference(reference):
    features = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    reference.check(PKTLoss(**reference.params)(*features))


@pytest.mark.parametrize("eps", [1e-7, 0.3])
def test_equals_the_formula_written_out(eps):
    student, teacher = draw(7, 3, seed=1) + 1, draw(7, 12, seed=2)
    expected = by_hand(student, teacher, eps)
    assert PKTLoss(eps)(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_a_small_loss_keeps_its_digits_in_float32():
    teacher = draw(64, 256, seed=1).relu().float()
    student = teacher + 0.01 * draw(64, 256, seed=2, dtype=torch.float32)
    expected = PKTLoss()(student.double(), teacher.double()).item()
    assert expected < 1e-8
    assert PKTLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-3)


def test_identical_features_give_0():
    student = draw(5, 4, dtype=torch.float32).requires_grad_()
    loss = PKTLoss()(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() < 1e-7


def test_a_vector_of_zeros_is_unlike_all_and_gets_no_gradient():
    student, teacher = draw(5, 4, seed=1), draw(5, 4, seed=2)
    student[2] = 0
    teacher[3] = 0
    student.requires_grad_()
    loss = PKTLoss()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(by_hand(student.detach(), teacher))
    assert not student.grad[2].any()
    assert student.grad.abs().max() < 1


def test_opposite_vectors_whose_cosine_is_rounded_below_minus_1_give_a_finite_loss():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, other = torch.randn(2, 20_000, generator=generator)
        sides = torch.stack([one, -one]), torch.stack([one, other])
        for ours, theirs in (sides, sides[::-1]):
            features = ours.clone().requires_grad_()
            value = PKTLoss()(features, theirs)
            value.backward()
            assert value.isfinite()
            assert features.grad.isfinite().all()


def test_a_single_sample_gives_0():
    student = draw(1, 4).requires_grad_()
    loss = PKTLoss()(student, draw(1, 6, seed=1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)


def test_maps_are_flattened():
    student, teacher = draw(4, 3, 1, 1, seed=1), draw(4, 5, 2, 1, seed=2)
    flat = PKTLoss()(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(PKTLoss()(student, teacher), flat)


def test_half_precision_is_within_a_percent():
    student, teacher = draw(16, 8, seed=1), draw(16, 8, seed=2)
    rounded = PKTLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(PKTLoss()(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"eps": 0.0}, r"PKTLoss: eps must be a finite number > 0, got 0\.0"),
        ({"gather": "some"}, r"PKTLoss: gather must be one of 'none', 'all', got 'some'"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        PKTLoss(**params)


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"PKTLoss: student \(2, 3\) and teacher \(4, 3\) must be"):
        PKTLoss()(torch.zeros(2, 3), torch.zeros(4, 3))


def test_printing_shows_every_parameter():
    assert repr(PKTLoss()) == "PKTLoss(eps=1e-07, gather='none')"
