"""WSLDLoss: the formula written out, its weights, and labels of several classes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from distill.testing import LossConformance
from distill_kd import KDLoss
from distill_kd.wsld import WSLDLoss


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(size, classes, seed=9):
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def cross_entropy(p, q):
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True) if a)


def weights_by_hand(student, teacher, probabilities):
    triples = zip(student.tolist(), teacher.tolist(), probabilities.tolist(), strict=True)
    return [
        1 - math.exp(-cross_entropy(y, softmax(s)) / (cross_entropy(y, softmax(t)) + 1e-7))
        for s, t, y in triples
    ]


def terms_by_hand(student, teacher, temperature, soft_term):
    found = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        entropy = cross_entropy(p, p) if soft_term == "kl" else 0.0
        found.append(cross_entropy(p, q) - entropy)
    return found


def one_hot(targets, classes):
    return torch.nn.functional.one_hot(targets, classes).double()


SHAPES = [(1, 2), (3, 7), (6, 4)]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("soft_term", ["cross_entropy", "kl"])
@pytest.mark.parametrize(("shape", "temperature"), list(product(SHAPES, [0.7, 4])))
def test_equals_the_formula_written_out(shape, temperature, soft_term, soft):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = logits(*shape, seed=3).softmax(1) if soft else labels(*shape)
    weights = weights_by_hand(student, teacher, targets if soft else one_hot(targets, shape[1]))
    terms = terms_by_hand(student, teacher, temperature, soft_term)
    expected = sum(w * h for w, h in zip(weights, terms, strict=True)) / shape[0]

    loss = WSLDLoss(temperature, 0.3, soft_term)(student, teacher, targets)

    assert loss.item() == pytest.approx(0.3 * temperature * temperature * expected, rel=1e-9)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("soft_term", ["cross_entropy", "kl"])
def test_gradient_is_that_of_kd_with_the_weights_for_constants(soft_term, standardize):
    student, teacher, targets = logits(4, 5, seed=3), logits(4, 5, seed=4), labels(4, 5)
    student.requires_grad_()
    weights = weights_by_hand(student.detach(), teacher, one_hot(targets, 5))

    loss = WSLDLoss(2.5, 1.3, soft_term, standardize=standardize)(student, teacher, targets)

    kd = KDLoss(2.5, alpha=0.0, beta=1.3, standardize=standardize)
    each = [kd(student[[row]], teacher[[row]]) * weights[row] for row in range(4)]
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(torch.stack(each).mean(), student)
    )


def test_identical_logits_give_the_teacher_s_entropy_weighed_alike():
    student, targets = logits(4, 5), labels(4, 5)
    entropies = terms_by_hand(student, student, 3.0, "cross_entropy")
    expected = (1 - math.exp(-1)) * 9 * 0.7 * sum(entropies) / 4
    loss = WSLDLoss(3.0, 0.7)(student, student, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(WSLDLoss(3.0, 0.7, "kl")(student, student, targets).item()) < 1e-15


@pytest.mark.parametrize(("lead", "weight"), [(30.0, 0.0), (-30.0, 1.0)])
def test_what_the_student_knows_of_the_label_switches_the_teacher_off(lead, weight):
    student, teacher = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    student[0, 0] = lead
    targets = torch.tensor([0])
    loss = WSLDLoss(1.0, 1.0)(student, teacher, targets)
    unweighted = KDLoss(1.0, alpha=0.0, soft_term="cross_entropy")(student, teacher)
    assert loss.item() == pytest.approx(weight * unweighted.item(), abs=1e-6)


def test_a_teacher_without_a_doubt_counts_fully_unless_the_student_has_none():
    teacher = torch.tensor([[1e4, 0.0, 0.0], [1e4, 0.0, 0.0]])
    student = torch.tensor([[1.0, 0.0, 0.0], [1e4, 0.0, 0.0]])
    loss = WSLDLoss(1.0, 1.0)(student, teacher, torch.tensor([0, 0]))
    expected = torch.nn.functional.cross_entropy(student[:1], torch.tensor([0])) / 2
    torch.testing.assert_close(loss, expected)


def test_standardising_leaves_the_weights_as_they_are():
    student, teacher, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), labels(3, 5)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (student, teacher)]
    weights = weights_by_hand(student, teacher, one_hot(targets, 5))
    terms = terms_by_hand(*z, 2.0, "cross_entropy")
    expected = 4 * sum(w * h for w, h in zip(weights, terms, strict=True)) / 3
    loss = WSLDLoss(2.0, 1.0, standardize=True)(student, teacher, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


class TestWSLDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return WSLDLoss(2.0, 1.0)

    def tensors(self, batch):
        return {
            "student": torch.randn(batch, 5),
            "teacher": torch.randn(batch, 5),
            "targets": torch.randint(5, (batch,)),
        }

    # Not by finite differences, for the weights are constants: see the test of gradients above.
    test_gradient_is_that_of_the_formula = None
