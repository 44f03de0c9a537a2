"""Features as vectors: averaged over positions, divided by their norm, compared."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from distill_fitnet.feature_shapes import check_form

Reduction = Literal["mean", "sum"]


def as_vectors(owner: object, features: Tensor) -> Tensor:
    """Return vectors (B, D) as they are, and maps (B, C, H, W) averaged over their positions."""
    check_form(owner, features, 4, 2)
    return features.mean((2, 3)) if features.ndim == 4 else features


def unit_vectors(features: Tensor, p: float = 2.0, dim: int = 1, smallest: float = 0.0) -> Tensor:
    """Divide vectors along a dimension by their p-norm.

    One whose norm is not larger than ``smallest`` becomes 0, without a gradient: the slope of the
    normalisation there is ``1 / smallest``.
    """
    norm: Tensor = torch.linalg.vector_norm(features, p, dim=dim, keepdim=True)
    # A product's gradient takes fewer passes over the features than a quotient's.
    return features * norm.masked_fill(norm <= smallest, math.inf).reciprocal()


def vector_distance(student: Tensor, teacher: Tensor, p: float, reduction: Reduction) -> Tensor:
    """Return the distance of vectors (B, D): over elements for p = 1, of samples' p-norms else."""
    difference = student - teacher
    if p == 1:
        distance = difference.abs()
    else:
        distance = torch.linalg.vector_norm(difference, p, dim=1)
    return distance.mean() if reduction == "mean" else distance.sum()
