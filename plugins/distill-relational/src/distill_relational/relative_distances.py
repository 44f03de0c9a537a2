"""The distances of all pairs of vectors in units of their mean, compared pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_relational.pair_distances import pair_matrices

SMALLEST = 1e-6
"""What a distance of two samples is taken for, at least."""


def distance_difference(distances: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return the sum over ordered pairs of the smooth L1 distance of relative distances.

    Relative is each side's Euclidean distance over its mean of all pairs. Each unordered pair is
    looked at once.

    Args:
        distances: of the student's and the teacher's pairs (2, B * (B - 1) / 2).
        batch: B.

    Returns:
        The sum as a scalar, 0 for a single vector, and its derivative by each of the student's
        squared distances (B, B), 0 where a distance is not above 1e-6.
    """
    clamped = distances.clamp(min=SMALLEST)
    means = clamped.mean(1, keepdim=True)
    ours, theirs = clamped.div_(means)
    difference = ours - theirs
    slopes = difference.clamp(-1, 1)
    # Half of the square up to 1, and the distance less a half beyond; each pair counts twice.
    total = 2 * torch.dot(slopes, difference.sub_(slopes, alpha=0.5))
    # Through a distance, then through the mean, which all distances change alike.
    slopes.sub_(torch.dot(slopes, ours), alpha=1 / max(1, len(ours)))
    lengths = torch.threshold(distances[0], SMALLEST, torch.inf).mul_(means[0])
    return total, pair_matrices(slopes.div_(lengths), batch)
