"""The angles of all triplets of vectors, compared in a bounded amount of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22
"""Angles that are looked at together; at least all those at one vertex."""
CHUNK_ON_CPU = 2**18
"""Fewer there, for what a core's cache holds is read faster."""
SMALLEST = 1e-12
"""Distance up to which two vectors count as one, between which there is no direction."""


def angle_difference(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of smooth L1 distances of the cosines of all angles.

    With squared distances S, the law of cosines gives the angle at j between i and k:
    (S_ji + S_jk - S_ik) / (2 sqrt(S_ji S_jk)), or 0 where i or k is at j. The vectors themselves
    are not needed, and so neither is their width. Where i is close to j, the numerator is a small
    difference of large squares, so it is added up in the type of the squares and then rounded.

    The gradient is computed together with the value, for max(2**22, B * B) angles at a time (2**18
    on a CPU), in four arrays of so many numbers and one of the type of the squares. Second
    derivatives are not meant to be taken.

    Args:
        student: squared distances (B, B), float64 for angles in float32; it gets the gradient.
        teacher: squared distances (B, B), likewise.
        dtype: type in which angles are compared.

    Returns:
        The sum as a scalar, of the type of the squares.
    """
    total: Tensor = _AngleDifference.apply(student, teacher, dtype)
    return total


class _AngleDifference(torch.autograd.Function):
    """Value and gradient in one go; what the backward keeps is (B, B)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
        batch = len(student)
        ours, theirs = (_inverse_roots(squares).to(dtype) for squares in (student, teacher))
        total = student.new_zeros(())
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        vertices = max(1, _chunk(student) // max(1, batch * batch))
        shape = min(vertices, batch), batch, batch
        arrays = student.new_empty(4, *shape, dtype=dtype)
        numerators = student.new_empty(shape)
        for start in range(0, batch, vertices):
            rows = slice(start, min(start + vertices, batch))
            halves, cosines, difference, slopes = arrays[:, : rows.stop - start]
            wide = numerators[: rows.stop - start]
            _cosines(teacher, theirs, rows, halves, wide, out=difference)
            _cosines(student, ours, rows, halves, wide, out=cosines)
            torch.sub(cosines, difference, out=difference)
            torch.clamp(difference, -1, 1, out=slopes)
            # Half of the square up to 1, and the distance less a half beyond.
            flat = slopes.flatten()
            total += torch.dot(flat, difference.flatten()) - torch.dot(flat, flat) / 2
            if gradient is not None:
                # Of the inverse roots, then of the three squared distances in the numerator.
                gradient[rows] -= ours[rows].square() * cosines.mul_(slopes).sum(2)
                slopes *= halves
                gradient[rows] += 2 * slopes.sum(2)
                gradient -= slopes.sum(0)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


def _chunk(tensor: Tensor) -> int:
    return CHUNK_ON_CPU if tensor.device.type == "cpu" else CHUNK


def _inverse_roots(squares: Tensor) -> Tensor:
    return squares.masked_fill(squares <= SMALLEST**2, torch.inf).rsqrt()


def _cosines(
    squares: Tensor, inverse: Tensor, rows: slice, halves: Tensor, wide: Tensor, out: Tensor
) -> None:
    """Write the angles at some vertices, and half of the products of their inverse roots."""
    at_vertex, roots = squares[rows], inverse[rows]
    torch.mul((roots / 2).unsqueeze(2), roots.unsqueeze(1), out=halves)
    torch.sub(at_vertex.unsqueeze(1), squares, out=wide)
    out.copy_(wide.add_(at_vertex.unsqueeze(2))).mul_(halves)
