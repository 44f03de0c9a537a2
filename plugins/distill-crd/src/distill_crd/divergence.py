"""The divergence of softened distributions, as a mean over all rows or over those that are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float, kept: Tensor | None = None
) -> Tensor:
    r"""Return :math:`T^2 \, KL(softmax(teacher / T) \| softmax(student / T))`, a mean over rows.

    Args:
        student, teacher: scores (..., K); the teacher gets no gradient.
        temperature: T.
        kept: mask (...) of the rows that count; where it keeps none, the divergence is 0.
    """
    with torch.no_grad():
        log_teacher = F.log_softmax(teacher / temperature, dim=-1)
        # A class that the teacher excludes has -inf, and 0 * inf would be NaN.
        log_teacher.clamp_(min=torch.finfo(teacher.dtype).min)
        share = log_teacher.exp()
    log_student = F.log_softmax(student / temperature, dim=-1)
    # Less by a pass over all scores, each way, than torch's kl_div takes for it.
    gained = (log_student - log_teacher).mul_(share)
    if kept is None:
        rows = student.numel() // student.shape[-1]
        return gained.sum() * (-(temperature**2) / rows)
    total = torch.where(kept, gained.sum(-1), 0.0).sum() * -(temperature**2)
    return total / kept.count_nonzero().clamp(min=1)


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in float32, or in float64 if one of them is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)
