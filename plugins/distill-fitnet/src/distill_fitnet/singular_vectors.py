"""Leading singular vectors of maps, with gradients: by multiplying where that is enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill import once_differentiable
from distill_fitnet.feature_pairs import Pair
from distill_fitnet.vectors import unit_vectors

Samples = Tensor | EllipsisType
"""Numbers of samples, or ... for all."""

STEPS = 24
"""Multiplications with a matrix: to find its first eigenvector, and to find how that moves."""

ROUNDING = 4.0
"""Of how many roundings an error may be that counts as none."""


@dataclass(frozen=True)
class MainVector:
    """The first singular vectors of maps, found without a decomposition.

    Vectors are rows here, since their product with many matrices is a tenth of the work.

    Attributes:
        maps: the maps as matrices (B, N, M), N the channels or positions, whichever are fewer.
        positions: whether N are the positions.
        norm: of maps maps^T, (B, 1, 1).
        gram: maps maps^T / norm.
        first: its first eigenvector, (B, 1, N), without a gradient.
        value: its first eigenvalue, (B, 1, 1).
        others: what no other eigenvalue is larger than, (B, 1, 1).
        clear: (B,), where all this is certain and exact but for rounding.
    """

    maps: Tensor
    positions: bool
    norm: Tensor
    gram: Tensor
    first: Tensor
    value: Tensor
    others: Tensor
    clear: Tensor

    @classmethod
    def of(cls, features: Tensor) -> MainVector:
        """Find it for maps (B, C, H, W).

        Eigenvalues are >= 0 and their squares add up to the squared norm of the matrix, 1: so none
        but the first is larger than what that leaves. The residual divided by the distance to it
        bounds the error of the vector.
        """
        maps, positions = smaller_side(features)
        with torch.no_grad():
            gram = maps @ maps.mT
            norm = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True)
            gram /= norm.clamp(min=torch.finfo(gram.dtype).tiny)
            largest = gram.diagonal(dim1=1, dim2=2).argmax(1)
            first = gram.take_along_dim(largest[:, None, None], 1)
            for _ in range(STEPS):
                first = F.normalize(first, dim=2) @ gram
            first = F.normalize(first, dim=2)
            image = first @ gram
            value = (image * first).sum(2, keepdim=True)
            others = (1 - value.square()).clamp(min=0).sqrt()
            residual = torch.linalg.vector_norm(image - value * first, dim=2, keepdim=True)
            # Rounding alone gives a residual that grows with the size of the matrix.
            allowed = ROUNDING * torch.finfo(gram.dtype).eps * math.sqrt(gram.shape[1])
            clear = residual < allowed * (value - others)
            clear &= _left_by_a_step(value, others) <= allowed ** (1 / STEPS)
        return cls(maps, positions, norm, gram, first, value, others, clear.flatten())

    def on_channels(self) -> Tensor:
        """Return the singular vectors on the side of the channels, (B, C, 1), with no gradient."""
        return on_channels(self.maps.detach(), self.positions, self.first.mT)

    def vectors(self, chosen: Samples) -> Tensor:
        """Return these vectors with a gradient, for chosen samples."""
        found = self.maps, self.norm, self.gram, self.first, self.value, self.others
        maps, *kept = (of_samples(each, chosen) for each in found)
        return on_channels(maps, self.positions, Following.apply(maps, *kept).mT)


class Following(torch.autograd.Function):
    """The first eigenvector v of R R^T, and how it follows R.

    By perturbation theory v moves by (value - R R^T)^+ d(R R^T) v. On what is orthogonal to v the
    matrix in brackets lies between value - others and value, and so the equation is solved by steps
    of fixed length.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, *found: Tensor) -> Tensor:
        """Return the vector; ``found`` are norm, gram, first, value and others of a MainVector."""
        ctx.save_for_backward(maps, *found)
        return found[2].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the maps."""
        maps, norm, gram, first, value, others = ctx.saved_tensors
        with torch.autocast(maps.device.type, enabled=False):
            length = 2 / (2 * value - others)
            across = (slope - first * (first * slope).sum(2, keepdim=True)) * length
            keep = 1 - length * value
            moved = across
            for _ in range(STEPS):
                moved = across + keep * moved + length * (moved @ gram)
            # Rounding along v would grow.
            moved = (moved - first * (first * moved).sum(2, keepdim=True)) / norm
            left, right = torch.cat((moved, first), 1), torch.cat((first, moved), 1)
            return left.mT @ (right @ maps), None, None, None, None, None


def _left_by_a_step(value: Tensor, others: Tensor) -> Tensor:
    """Return what a step of ``Following`` leaves of an error at most."""
    return others / (2 * value - others)


def main_vectors(features: Tensor) -> Tensor:
    """Return the first singular vectors (B, C, 1) on the side of the channels, as exact ones."""
    main = MainVector.of(features)
    return by_sample(
        main.clear,
        lambda clear: main.vectors(clear),
        lambda others: right_singular_vectors(of_samples(features, others), 1)[0],
    )


def by_sample(
    chosen: Tensor,
    one: Callable[[Samples], Tensor],
    other: Callable[[Samples], Tensor],
) -> Tensor:
    """Return what one function gives for the chosen samples and another for the rest."""
    count = int(chosen.sum())
    if count in (0, len(chosen)):
        # An index of all would cost a copy there and one back.
        return (one if count else other)(...)
    first, second = chosen.nonzero().squeeze(1), (~chosen).nonzero().squeeze(1)
    order = torch.cat((first, second)).argsort()
    return torch.cat((one(first), other(second)))[order]


def of_samples(tensor: Tensor, chosen: Samples) -> Tensor:
    return tensor if isinstance(chosen, EllipsisType) else tensor[chosen]


def smaller_side(features: Tensor) -> tuple[Tensor, bool]:
    """Return maps as matrices (B, N, M), N <= M, and whether N are the positions."""
    rows = features.flatten(2)
    positions = rows.shape[1] > rows.shape[2]
    return rows.mT if positions else rows, positions


def on_channels(rows: Tensor, positions: bool, vectors: Tensor) -> Tensor:
    """Return singular vectors on the side of the channels from those of the smaller side."""
    if not positions:
        return vectors
    # v_i is A^T u_i, divided by its norm.
    return unit_vectors(rows.mT @ vectors, smallest=torch.finfo(rows.dtype).tiny)


def right_singular_vectors(features: Tensor, count: int) -> Pair:
    """Return the first singular vectors on the side of the channels, and the singular values.

    Args:
        features: maps (B, C, H, W), seen as matrices A of H * W rows and C columns.
        count: how many; at most as many as there are are returned.

    Returns:
        Vectors (B, C, count), with a gradient, and values (B, count), without. A vector whose
        singular value is 0 is 0.
    """
    rows, positions = smaller_side(features)
    vectors, squares = leading_eigenvectors(rows, count)
    return on_channels(rows, positions, vectors), squares.clamp(min=0).sqrt()


def leading_eigenvectors(rows: Tensor, count: int) -> Pair:
    """Return eigenvectors (B, N, count) of R R^T by falling eigenvalue, and these values.

    The vectors have a gradient, that of perturbation theory: with M = R R^T, v_i moves by the sum
    over j of v_j (v_j . dM v_i) / (value_i - value_j).

    Args:
        rows: R, (B, N, M).
        count: how many; at most N are returned.
    """
    with torch.no_grad():
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(rows @ rows.mT))
    first, leading = vectors[:, :, :count], values[:, :count]
    if rows.requires_grad:
        change = rows @ (rows.mT @ first)
        along = vectors.mT @ (change - change.detach())
        along = along * _damped_inverse(leading.unsqueeze(1), values.unsqueeze(2))
        first = first + vectors @ along
    return first, leading


def _damped_inverse(value: Tensor, other: Tensor) -> Tensor:
    """Return 1 / (value - other), falling to 0 where rounding hides the difference."""
    limits = torch.finfo(value.dtype)
    gap = value - other
    noise = limits.eps * torch.maximum(value, other).square()
    return gap / (gap.square() + noise).clamp(min=limits.tiny)
