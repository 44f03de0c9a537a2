"""The distances of all pairs of vectors, compared pair by pair, with the gradient at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_relational.squared_distances import pair_distances, pulls

SMALLEST = 1e-6
"""What a distance of two samples is taken for, at least."""


def distance_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum over ordered pairs of the smooth L1 distance of relative distances.

    Relative is each side's Euclidean distance over its mean of all pairs. Each unordered pair is
    looked at once, and the gradient is found together with the value, so that small batches, where
    each operation costs more than what it computes, take few of them. Second derivatives are not
    meant to be taken.

    Args:
        student: vectors (B, D_s), which get the gradient; not through a distance below 1e-6.
        teacher: vectors (B, D_t).

    Returns:
        A scalar, 0 for a single vector.
    """
    total: Tensor = _DistanceDifference.apply(student, teacher)
    return total


class _DistanceDifference(torch.autograd.Function):
    """What the backward keeps is a number for each pair."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = pair_distances(student), pair_distances(teacher)
        is_close = ours < SMALLEST
        (ours, mean), (theirs, their_mean) = _with_mean(ours), _with_mean(theirs)
        difference = ours / mean - theirs / their_mean
        slopes = difference.clamp(-1, 1)
        # Half of the square up to 1, and the distance less a half beyond; each pair counts twice.
        total = 2 * torch.dot(slopes, difference) - torch.dot(slopes, slopes)
        # Through a distance, then through the mean, which all distances change alike.
        gradient = slopes - torch.dot(slopes, ours) / (mean * max(1, len(ours)))
        gradient = gradient.mul_(2 / mean).div_(ours).masked_fill_(is_close, 0)
        ctx.save_for_backward(student, gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        student, gradient = ctx.saved_tensors
        return outer * pulls(student, gradient), None


def _with_mean(distances: Tensor) -> tuple[Tensor, Tensor]:
    distances = distances.clamp_(min=SMALLEST)
    return distances, distances.sum() / max(1, len(distances))
