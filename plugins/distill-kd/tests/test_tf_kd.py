"""VirtualTeacherLoss: the formula written out, smoothed labels, and mixtures."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_kd.tf_kd import VirtualTeacherLoss


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(*shape, classes, seed=9):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def virtual(label, classes, sure, temperature):
    other = (1 - sure) / (classes - 1)
    return softmax([sure if k == label else other for k in range(classes)], temperature)


def sums_by_hand(student, targets, sure, temperature):
    """Return the summed divergence from the virtual teacher, and the summed cross entropy."""
    soft, hard = 0.0, 0.0
    for row, label in zip(student.tolist(), targets.tolist(), strict=True):
        q = softmax(row)
        p = virtual(label, len(row), sure, temperature)
        soft += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard -= math.log(q[label])
    return soft, hard


@pytest.mark.parametrize("reduction", ["batchmean", "positionmean", "mean"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, None), (0.0, 2.0), (1.5, 0.4)])
@pytest.mark.parametrize(
    ("shape", "sure", "temperature"),
    [(*s, t) for s, t in product([((1, 2), 0.99), ((3, 7), 0.6)], [0.1, 20.0])],
)
def test_equals_the_formula_written_out(shape, sure, temperature, alpha, beta, reduction):
    student, targets = logits(*shape, seed=1), labels(shape[0], classes=shape[1])
    soft, hard = sums_by_hand(student, targets, sure, temperature)
    divisor = student.numel() if reduction == "mean" else shape[0]
    weight = 1 - alpha if beta is None else beta

    loss = VirtualTeacherLoss(temperature, alpha, beta, sure, reduction)(student, targets)

    expected = alpha * hard / shape[0] + weight * soft / divisor
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_positions_of_dense_logits_are_summed_averaged_or_averaged_with_classes():
    student, targets = logits(2, 5, 3, 4), labels(2, 3, 4, classes=5)
    rows = student.movedim(1, -1).reshape(-1, 5)
    soft, _ = sums_by_hand(rows, targets.flatten(), 0.99, 20.0)
    for reduction, divisor in {"batchmean": 2, "positionmean": 24, "mean": 120}.items():
        loss = VirtualTeacherLoss(alpha=0.0, reduction=reduction)(student, targets)
        assert loss.item() == pytest.approx(soft / divisor)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_gradient_equals_finite_differences(reduction, soft):
    student, targets = logits(4, 5).requires_grad_(), labels(4, classes=5)
    targets = logits(4, 5, seed=3).softmax(1) if soft else targets
    loss = VirtualTeacherLoss(0.5, 0.4, 1.3, 0.8, reduction)
    assert torch.autograd.gradcheck(lambda s: loss(s, targets), student)


def test_the_virtual_teacher_s_own_probabilities_give_zero_and_no_gradient():
    own = torch.tensor([virtual(label, 5, 0.9, 0.3) for label in (0, 3)])
    student = own.log().requires_grad_()
    loss = VirtualTeacherLoss(0.3, 0.0, 1.0, 0.9)(student, torch.tensor([0, 3]))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_it_has_the_gradient_of_smoothed_labels():
    student, targets = logits(4, 5).requires_grad_(), labels(4, classes=5)
    other = virtual(0, 5, 0.9, 2.0)[1]
    loss = VirtualTeacherLoss(2.0, 0.0, 1.0, 0.9)(student, targets)
    smoothed = F.cross_entropy(student, targets, label_smoothing=5 * other)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student), torch.autograd.grad(smoothed, student)
    )


def test_mixed_labels_have_the_mixture_of_their_virtual_teachers():
    student, mixed = logits(1, 4), torch.tensor([[0.7, 0.0, 0.3, 0.0]]).double()
    both = [virtual(label, 4, 0.9, 0.5) for label in (0, 2)]
    p = [0.7 * a + 0.3 * b for a, b in zip(*both, strict=True)]
    q = softmax(student[0].tolist())
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = VirtualTeacherLoss(0.5, 0.0, 1.0, 0.9)(student, mixed)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
@pytest.mark.parametrize("sure", [0.0, 0.99, 1.0])
def test_any_temperature_gives_finite_numbers(sure, temperature):
    student = logits(3, 6, dtype=torch.float32).requires_grad_()
    targets = labels(3, classes=6)
    loss = VirtualTeacherLoss(temperature, 0.0, 1.0, sure)(student, targets)
    loss.backward()
    assert student.grad.isfinite().all()
    if temperature < 1 and sure > 0:
        torch.testing.assert_close(loss, F.cross_entropy(student, targets))
    elif temperature > 1:
        uniform = -math.log(6) - student.detach().log_softmax(1).mean()
        torch.testing.assert_close(loss, uniform, rtol=1e-3, atol=0)


class TestVirtualTeacherLoss(LossConformance):
    def make(self):
        return VirtualTeacherLoss()

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "targets": torch.randint(5, (batch,))}
