"""Student's and teacher's features, one of each or a list of each, as pairs to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Features = Tensor | Sequence[Tensor]
"""One feature, or one for each of several layers."""

Pair = tuple[Tensor, Tensor]


def as_list(features: Features) -> list[Tensor]:
    """Return features as a list, whether one or several were given."""
    return [features] if isinstance(features, Tensor) else list(features)


def feature_pairs(student_features: Features, teacher_features: Features) -> list[Pair]:
    """Pair student's and teacher's features, layer by layer, ready for a loss.

    Both come back in one type, float32 or wider, since half precision loses the small differences
    that losses are made of; the teacher's without a gradient.

    Raises:
        ValueError: if there are not as many of one as of the other.
    """
    students, teachers = as_list(student_features), as_list(teacher_features)
    if len(students) != len(teachers):
        raise ValueError(
            f"{len(students)} features of the student cannot be paired with {len(teachers)} of "
            "the teacher"
        )
    return [_comparable(s, t) for s, t in zip(students, teachers, strict=True)]


def _comparable(student: Tensor, teacher: Tensor) -> Pair:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)
