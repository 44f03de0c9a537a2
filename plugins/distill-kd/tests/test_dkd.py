"""DKDLoss: the formula written out, identities, and the one class that is not compared."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from distill.testing import LossConformance
from distill_kd import KDLoss
from distill_kd.dkd import DKDLoss


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(size, classes, seed=9):
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def parts_by_hand(student, teacher, targets, temperature):
    """Return the mean divergences of label and rest, and within the rest."""
    target, rest = 0.0, 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        p, q = softmax(s, temperature)[y], softmax(t, temperature)[y]
        target += divergence([q, 1 - q], [p, 1 - p])
        others = [[z for k, z in enumerate(row) if k != y] for row in (t, s)]
        rest += divergence(*(softmax(row, temperature) for row in others))
    return target / len(targets), rest / len(targets)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 1.7), (0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize(
    ("shape", "temperature"), list(product([(1, 2), (3, 7), (6, 4)], [0.7, 4]))
)
def test_equals_the_formula_written_out(shape, temperature, alpha, beta):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = labels(*shape)
    target, rest = parts_by_hand(student, teacher, targets, temperature)

    loss = DKDLoss(temperature, alpha, beta)(student, teacher, targets)

    expected = temperature * temperature * (alpha * target + beta * rest)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (1, 2)])
def test_gradient_equals_finite_differences(shape, standardize):
    student, teacher, targets = logits(*shape, seed=3), logits(*shape, seed=4), labels(*shape)
    loss = DKDLoss(1.5, 0.4, 1.3, standardize=standardize)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets), student.requires_grad_())


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_identical_logits_give_exactly_zero_and_no_gradient(temperature, standardize):
    student = logits(5, 6, dtype=torch.float32).requires_grad_()
    loss = DKDLoss(temperature, standardize=standardize)
    value = loss(student, student.detach().clone(), labels(5, 6))
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max() < 1e-5


def test_weighed_with_the_teacher_s_doubt_the_parts_are_plain_kd():
    """The paper's equation 7: beta = 1 - p_y of the teacher, sample by sample."""
    student, teacher, targets = logits(4, 6, seed=1), logits(4, 6, seed=2), labels(4, 6)
    doubt = 1 - (teacher / 3).softmax(1).gather(1, targets[:, None])[:, 0]
    found = [
        DKDLoss(3.0, 1.0, doubt[row].item())(student[[row]], teacher[[row]], targets[[row]])
        for row in range(4)
    ]
    kd = KDLoss(3.0, alpha=0.0)(student, teacher)
    torch.testing.assert_close(torch.stack(found).mean(), kd)


def test_two_classes_have_nothing_within_the_rest():
    student, teacher = logits(3, 2, seed=1).requires_grad_(), logits(3, 2, seed=2)
    loss = DKDLoss(2.0, alpha=0.0)(student, teacher, labels(3, 2))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


def test_a_label_s_logit_is_no_part_of_the_rest():
    student, teacher, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), labels(3, 5)
    student.requires_grad_()
    loss = DKDLoss(alpha=0.0)(student, teacher, targets)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.gather(1, targets[:, None]).eq(0).all()
    assert gradient.ne(0).sum() == 3 * 4


def test_standardised_logits_do_not_tell_their_size():
    student, teacher, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), labels(3, 5)
    loss = DKDLoss(2.0, standardize=True)
    expected = loss(student, teacher, targets)
    moved = loss(3 * student + 1, 0.2 * teacher - 5, targets)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(DKDLoss(2.0)(*z, targets), expected, rtol=1e-5, atol=0)


def test_a_teacher_of_the_label_alone_tells_nothing_of_the_rest():
    student, targets = logits(3, 5, seed=1).requires_grad_(), labels(3, 5)
    teacher = torch.full((3, 5), -math.inf).scatter_(1, targets[:, None], 2.0)
    loss = DKDLoss(1.0, alpha=1.0, beta=8.0)(student, teacher, targets)
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, targets))
    assert student.grad.isfinite().all()


def test_a_sure_student_s_doubt_is_told_apart_from_none():
    """1 - p_y rounds to 0 in float32, its logarithm does not."""
    student = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0]])
    loss = DKDLoss(1.0, 1.0, 0.0)(student, teacher, torch.tensor([0]))
    p, rest = 1 / 3, 40 - math.log(2)
    assert loss.item() == pytest.approx(p * math.log(p) + (1 - p) * (math.log(1 - p) + rest))


class TestDKDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return DKDLoss(2.0, 1.0, 2.0)

    def tensors(self, batch):
        return {
            "student": torch.randn(batch, 5),
            "teacher": torch.randn(batch, 5),
            "targets": torch.randint(5, (batch,)),
        }
