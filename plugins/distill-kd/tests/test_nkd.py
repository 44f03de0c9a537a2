"""NKDLoss: the formula written out, identities, and the one class that is not compared."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from distill.testing import LossConformance
from distill_kd.nkd import NKDLoss


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(size, classes, seed=9):
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def parts_by_hand(student, teacher, targets, temperature):
    """Return the mean cross entropies of the label and of the rest."""
    target, rest = 0.0, 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        target -= softmax(t)[y] * math.log(softmax(s)[y])
        p, q = (softmax(row[:y] + row[y + 1 :], temperature) for row in (t, s))
        rest -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    return target / len(targets), rest / len(targets)


@pytest.mark.parametrize("gamma", [0.0, 1.7])
@pytest.mark.parametrize(
    ("shape", "temperature"), list(product([(1, 2), (3, 7), (6, 4)], [0.7, 4]))
)
def test_equals_the_formula_written_out(shape, temperature, gamma):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = labels(*shape)
    target, rest = parts_by_hand(student, teacher, targets, temperature)

    loss = NKDLoss(temperature, gamma)(student, teacher, targets)

    expected = target + gamma * temperature * temperature * rest
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (1, 2)])
def test_gradient_equals_finite_differences(shape, standardize):
    student, teacher, targets = logits(*shape, seed=3), logits(*shape, seed=4), labels(*shape)
    loss = NKDLoss(1.5, 1.3, standardize=standardize)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets), student.requires_grad_())


def test_identical_logits_give_the_teacher_s_entropy_terms():
    student, targets = logits(4, 6), labels(4, 6)
    p = student.softmax(1).gather(1, targets[:, None])
    rest = torch.stack([row[torch.arange(6) != y] for row, y in zip(student, targets, strict=True)])
    q = (rest / 3).softmax(1)
    expected = -(p * p.log()).mean() - 0.5 * 9 * (q * q.log()).sum(1).mean()
    torch.testing.assert_close(NKDLoss(3.0, 0.5)(student, student, targets), expected)


def test_where_the_rest_agrees_it_has_no_gradient():
    student, targets = logits(4, 6).requires_grad_(), labels(4, 6)
    teacher = student.detach().clone()
    with_rest = torch.autograd.grad(NKDLoss(3.0, 8.0)(student, teacher, targets), student)
    without = torch.autograd.grad(NKDLoss(3.0, 0.0)(student, teacher, targets), student)
    torch.testing.assert_close(with_rest, without)


def test_the_teacher_s_lead_of_the_label_is_no_part_of_the_rest():
    student, teacher, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), labels(3, 5)
    raised = teacher + 3 * torch.nn.functional.one_hot(targets, 5)
    first, second = (
        NKDLoss(2.0, 1.0)(student, t, targets) - NKDLoss(2.0, 0.0)(student, t, targets)
        for t in (teacher, raised)
    )
    torch.testing.assert_close(first, second)


def test_two_classes_have_the_label_s_part_alone():
    student, teacher, targets = logits(3, 2, seed=1), logits(3, 2, seed=2), labels(3, 2)
    torch.testing.assert_close(
        NKDLoss(2.0, 9.0)(student, teacher, targets), NKDLoss(2.0, 0.0)(student, teacher, targets)
    )


def test_standardising_changes_the_rest_alone():
    student, teacher, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), labels(3, 5)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (student, teacher)]
    target, _ = parts_by_hand(student, teacher, targets, 2.0)
    _, rest = parts_by_hand(*z, targets, 2.0)
    loss = NKDLoss(2.0, 0.7, standardize=True)(student, teacher, targets)
    assert loss.item() == pytest.approx(target + 0.7 * 4 * rest, rel=1e-6)


def test_a_teacher_of_the_label_alone_gives_the_cross_entropy():
    student, targets = logits(3, 5, seed=1).requires_grad_(), labels(3, 5)
    teacher = torch.full((3, 5), -math.inf).scatter_(1, targets[:, None], 2.0)
    loss = NKDLoss(2.0, 3.0)(student, teacher, targets)
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(student, targets))
    assert student.grad.isfinite().all()


class TestNKDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return NKDLoss(2.0, 1.0)

    def tensors(self, batch):
        return {
            "student": torch.randn(batch, 5),
            "teacher": torch.randn(batch, 5),
            "targets": torch.randint(5, (batch,)),
        }
