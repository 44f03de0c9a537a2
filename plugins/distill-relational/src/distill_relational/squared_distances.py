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
        # Distances do not see where the vectors' middle is, but rounding does.
        centred = vectors - vectors.mean(0)
        both = gradient + gradient.T
        pulls: Tensor = both.sum(1, keepdim=True) * centred - both @ centred
        return pulls * 2


def _squared_distances(vectors: Tensor) -> Tensor:
    if vectors.device.type != "cpu":
        direct = "donot_use_mm_for_euclid_dist"
        return torch.cdist(vectors, vectors, compute_mode=direct).square_()
    # Which takes ten times as long on a CPU.
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    squares = vectors.new_zeros(len(vectors), len(vectors))
    squares[first, second] = torch.pdist(vectors).square_()
    return squares + squares.T
