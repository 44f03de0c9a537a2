"""What a sum over positions and classes is divided by."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill_kd.logits import Rows

Reduction = Literal["batchmean", "positionmean", "mean"]


def divisor(reduction: Reduction, rows: Rows, batch: int) -> Tensor | int:
    """Return what the sum over the rows that count, and their classes, is divided by.

    Args:
        reduction: ``"batchmean"`` for the batch size, ``"positionmean"`` for the rows that count,
            ``"mean"`` for all their elements.
        rows: the rows.
        batch: how many samples they are of.
    """
    if reduction == "batchmean":
        return batch
    return rows.count() * (rows.student.shape[1] if reduction == "mean" else 1)
