"""What losses on the relations of a batch's samples share: their inputs, and whose batch it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from distill import gather as global_rows
from distill.parameters import Parametrized, check_choice

Gather = Literal["none", "all"]
"""Whose samples are related: those of one process, or those of all."""


class BatchRelationLoss(Parametrized):
    """A loss on how the samples of a batch relate to each other, whatever their features' widths.

    Args:
        gather: ``"none"`` relates the samples of this process, ``"all"`` those of all processes.
    """

    trains_teacher_side: ClassVar[bool] = False
    """Whether the gradient goes on to modules on the teacher's side."""

    def __init__(self, gather: Gather = "none") -> None:
        super().__init__()
        check_choice(self, "gather", gather, get_args(Gather))
        self.gather = gather

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of vectors (B, D_s) and (B, D_t) of one type, float32 or wider."""
        raise NotImplementedError

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        student, teacher = in_one_type(student_features, teacher_features)
        check_batch(self, student, teacher)
        student, teacher = student.flatten(1), teacher.flatten(1)
        if not self.trains_teacher_side:
            teacher = teacher.detach()
        if self.gather == "all":
            student, teacher = global_rows(student), global_rows(teacher)
        with full_precision(student):
            return self.relation_loss(student, teacher)


def in_one_type(*features: Tensor) -> list[Tensor]:
    """Return features in the widest of their types, float32 at least."""
    dtype = torch.float32
    for feature in features:
        dtype = torch.promote_types(dtype, feature.dtype)
    return [feature.to(dtype) for feature in features]


def full_precision(features: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast, which would multiply in half precision."""
    device = features.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()  # since torch's takes as long as several operations on a small batch
    return torch.autocast(device, enabled=False)


def check_batch(owner: object, student: Tensor, teacher: Tensor) -> None:
    """Refuse features that are not of the same batch, or have no batch at all.

    Raises:
        ValueError: naming both shapes.
    """
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise ValueError(
            f"{type(owner).__name__}: student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)} must be features (B, ...) of the same batch"
        )


def unit_vectors(
    vectors: Tensor, p: float = 2.0, dim: int = 1, smallest: float = 1e-12, eps: float = 0.0
) -> Tensor:
    """Divide vectors along a dimension by their p-norm plus ``eps``.

    One whose norm is not larger than ``smallest`` becomes 0, without a gradient: the slope of the
    normalisation there has no bound.
    """
    norm: Tensor = torch.linalg.vector_norm(vectors, p, dim=dim, keepdim=True)
    # A product's gradient takes fewer passes over the vectors than a quotient's.
    return vectors * norm.masked_fill(norm <= smallest, torch.inf).add(eps).reciprocal()
