"""What losses on the logits of student and teacher share: fitting shapes, one precision."""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_shape(owner: object, student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of different shapes.

    Raises:
        ValueError: naming both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{type(owner).__name__}: student and teacher logits must have the same shape, "
            f"got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )


def in_one_type(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits in the wider of their types, float32 at least, the teacher's detached."""
    # Half precision loses small probabilities, and T^2 then multiplies the error.
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)
