"""Maps of different height and width, brought to one size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the height and width of the smaller.

    Each dimension is taken for itself: where one map is higher and the other wider, both are
    pooled.
    """
    height, width = map(min, student.shape[-2:], teacher.shape[-2:])
    size = (height, width)
    return _pool_to(student, size), _pool_to(teacher, size)


def _pool_to(features: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(features.shape[-2:]) == size:
        return features
    return F.adaptive_avg_pool2d(features, size)
