"""A label against all other classes together, and those others among themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_kd.logits import divergence, log_probabilities


def check_has_rest(owner: object, logits: Tensor) -> None:
    """Refuse logits (N, K) of a single class, which has no others.

    Raises:
        ValueError: naming the number of classes.
    """
    if logits.shape[1] < 2:
        raise ValueError(
            f"{type(owner).__name__}: compares a label with the other classes, so there must be "
            f"two or more, got {logits.shape[1]}"
        )


def without_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits (N, K) with -inf at the labels (N, L)."""
    return logits.scatter(1, labels, -math.inf)


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """Return how far the label (N, 1) is above all others together, (N).

    Its sigmoid is the label's probability, and that of its negative the others', however close to 0
    either is. Where no other class has a chance, it is infinite.
    """
    others = without_labels(logits, label).logsumexp(1)
    return logits.gather(1, label)[:, 0] - others


def margin_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of "the label or another" with the teacher's and the student's margins.

    Args:
        student: margins (N).
        teacher: likewise; without gradient.
    """
    both = [torch.stack([F.logsigmoid(m), F.logsigmoid(-m)], 1) for m in (student, teacher)]
    return divergence(both[0], both[1].clamp_min(torch.finfo(teacher.dtype).min))


def rest_log_probabilities(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log of softmax(logits / temperature) over all classes but the labels, (N, K).

    It is finite: the labels have the lowest number there is, whose probability is 0. So have all
    classes, where none has a chance beside the labels.
    """
    rest = without_labels(logits, labels)
    none = rest.detach().amax(1, keepdim=True) == -math.inf
    found = log_probabilities(rest.masked_fill(none, 0.0), temperature)
    return found.masked_fill(none, torch.finfo(logits.dtype).min)
