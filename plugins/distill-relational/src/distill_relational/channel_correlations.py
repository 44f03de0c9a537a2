"""How the channels of each sample correlate, compared in a bounded amount of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill import once_differentiable

CHUNK = 2**24
"""Correlations that are looked at together; at least all those of one sample."""
CHUNK_ON_CPU = 2**19
"""Fewer there, for what a core's cache holds is read faster."""
SMALLEST = 1e-12
"""Norm up to which a row of products counts as zeros."""


def correlation_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return for each sample the squared difference of its channels' correlations, added up.

    Correlations are the products of a sample's channels, each row divided by its L2 norm; a row of
    zeros stays, without a gradient. The gradient is computed together with the values, for
    max(2**24, C * C) correlations at a time (2**19 on a CPU), in three arrays of so many numbers.
    It cannot be differentiated again.

    Args:
        student: (B, C, N), a channel's values in a row; it gets the gradient.
        teacher: (B, C, M).

    Returns:
        (B,).
    """
    differences: Tensor = _CorrelationDifference.apply(student, teacher)
    return differences


class _CorrelationDifference(torch.autograd.Function):
    """Values and gradient in one go; what the backward keeps is of the student's shape."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        batch, channels = student.shape[:2]
        values = student.new_empty(batch)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        samples = max(1, _chunk(student) // channels**2)
        arrays = student.new_empty(3, min(samples, batch), channels, channels)
        for start in range(0, batch, samples):
            part = slice(start, min(start + samples, batch))
            ours, apart, products = arrays[:, : part.stop - start]
            _correlations(teacher[part], out=apart)
            inverse = _correlations(student[part], out=ours)
            torch.sub(ours, apart, out=apart)
            values[part] = torch.mul(apart, apart, out=products).sum((1, 2))
            if gradient is not None:
                # What would change a row's length alone changes no correlation.
                along = torch.mul(apart, ours, out=products).sum(2, keepdim=True)
                apart.addcmul_(ours, along, value=-1).mul_(2 * inverse)
                torch.add(apart, apart.mT, out=products)
                gradient[part] = torch.bmm(products, student[part])
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return outer[:, None, None] * gradient, None


def _chunk(tensor: Tensor) -> int:
    return CHUNK_ON_CPU if tensor.device.type == "cpu" else CHUNK


def _correlations(rows: Tensor, out: Tensor) -> Tensor:
    """Write the correlations of (B, C, N), and return the inverse norms that make them."""
    torch.bmm(rows, rows.mT, out=out)
    norms: Tensor = torch.linalg.vector_norm(out, dim=2, keepdim=True)
    inverse = norms.masked_fill(norms <= SMALLEST, torch.inf).reciprocal()
    out.mul_(inverse)
    return inverse
