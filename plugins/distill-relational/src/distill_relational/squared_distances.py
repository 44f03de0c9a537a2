"""Squared distances of all pairs of vectors, and their gradient by one product of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def squared_distances(vectors: Tensor) -> Tensor:
    """Return the squared Euclidean distances (B, B) of vectors (B, D).

    They are summed up from differences, so that close vectors keep all digits and equal ones are at
    distance 0, whatever their length; nothing of size B * B * D is stored. The gradient's sum over
    pairs is a product of matrices, of the vectors less their mean. Second derivatives are not meant
    to be taken.
    """
    distances: Tensor = _SquaredDistances.apply(vectors)
    return distances


class _SquaredDistances(torch.autograd.Function):
    """Differences forward, a product of matrices backward."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(vectors)
        return _squared_distances(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (vectors,) = ctx.saved_tensors
        return 2 * _pulls(vectors, gradient + gradient.T)


def pair_distances(vectors: Tensor) -> Tensor:
    """Return the Euclidean distances of all pairs i < j of vectors (B, D), (B * (B - 1) / 2)."""
    if vectors.device.type == "cpu":
        return torch.pdist(vectors)
    first, second = _pairs(vectors)
    return _direct_distances(vectors)[first, second]


def pulls(vectors: Tensor, weights: Tensor) -> Tensor:
    """Return for each vector the sum of its differences from the others, (B, D).

    Args:
        vectors: (B, D).
        weights: of each pair's difference, as ``pair_distances`` orders them.
    """
    matrix = vectors.new_zeros(len(vectors), len(vectors))
    first, second = _pairs(vectors)
    matrix[first, second] = weights
    return _pulls(vectors, matrix + matrix.T)


def _pulls(vectors: Tensor, weights: Tensor) -> Tensor:
    # Distances do not see where the vectors' middle is, but rounding does.
    centred = vectors - vectors.mean(0)
    return weights.sum(1, keepdim=True) * centred - weights @ centred


def _squared_distances(vectors: Tensor) -> Tensor:
    if vectors.device.type != "cpu":
        return _direct_distances(vectors).square_()
    # Which takes ten times as long on a CPU.
    first, second = _pairs(vectors)
    squares = vectors.new_zeros(len(vectors), len(vectors))
    squares[first, second] = torch.pdist(vectors).square_()
    return squares + squares.T


def _direct_distances(vectors: Tensor) -> Tensor:
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")


def _pairs(vectors: Tensor) -> Tensor:
    batch = len(vectors)
    return torch.triu_indices(batch, batch, offset=1, device=vectors.device)
