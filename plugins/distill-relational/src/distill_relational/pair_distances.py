"""Distances of all pairs of vectors, and the gradient of what they are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill import once_differentiable
from distill_relational.batch_relations import full_precision

LARGEST = 1e18
"""Distance whose square float32 holds, and sums of which."""

Comparison = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the distances of pairs i < j on both sides (2, P), a sum over pairs, and its derivative by
each of the student's squared distances, symmetric (B, B)."""


def pair_distances(vectors: Tensor) -> Tensor:
    """Return the Euclidean distances of all pairs i < j of vectors (B, D), (B * (B - 1) / 2).

    They are summed up from differences, so that close vectors keep all digits and equal ones are at
    distance 0, whatever their length; nothing of size B * B * D is stored. They have no gradient.
    """
    vectors = vectors.detach()
    if vectors.device.type == "cpu":
        return torch.pdist(vectors)
    # Which takes ten times as long on a CPU.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    batch = len(vectors)
    first, second = torch.triu_indices(batch, batch, offset=1, device=vectors.device)
    return distances[first, second]


def are_well_spread(distances: Tensor, spread: float) -> bool:
    """Return whether on each side (2, P) the largest is at most so many times the smallest.

    Squares that float32 does not hold are not, either. A host has to wait for the answer.
    """
    if not distances.numel():
        return True
    ends = [torch.aminmax(side) for side in distances]
    return all(high.item() <= min(spread * low.item(), LARGEST) for low, high in ends)


def pair_matrices(pairs: Tensor, batch: int) -> Tensor:
    """Return what pairs i < j have (..., P) as symmetric matrices (..., B, B), whose diagonal is 0.

    Of all ways to say which entries these are, a mask takes the fewest and fastest operations on a
    CPU.
    """
    above = torch.ones(batch, batch, dtype=torch.bool, device=pairs.device).triu_(1)
    matrices = pairs.new_zeros(*pairs.shape[:-1], batch, batch).masked_scatter_(above, pairs)
    return matrices + matrices.mT


def compared(student: Tensor, distances: Tensor, compare: Comparison, weight: float) -> Tensor:
    """Return what a comparison of distances sums up, with its gradient for the student's vectors.

    That is found together with the value, so that small batches, where each operation costs more
    than what it computes, take few of them. It cannot be differentiated again.

    Args:
        student: vectors (B, D), which get the gradient.
        distances: of the student's and the teacher's pairs (2, B * (B - 1) / 2).
        compare: the comparison, see there.
        weight: by which its sum is multiplied.
    """
    total: Tensor = _Compared.apply(student, distances, compare, weight)
    return total


class _Compared(torch.autograd.Function):
    """What the backward keeps is the vectors and (B, B); its sum is a product of matrices."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, distances: Tensor, compare: Comparison, weight: float
    ) -> Tensor:
        total, pulls = compare(distances)
        ctx.save_for_backward(student, pulls)
        ctx.weight = weight
        return total.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        student, pulls = ctx.saved_tensors
        with full_precision(student):
            pulls = outer * pulls
            # Distances do not see where the vectors' middle is, but rounding does.
            moved = student - student.mean(0)
            # Each vector's differences from the others, which a squared distance changes by twice.
            own, twice = pulls.sum(1, keepdim=True) * moved, 2 * ctx.weight
            return torch.addmm(own, pulls, moved, beta=twice, alpha=-twice), None, None, None
