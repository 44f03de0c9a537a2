"""What metrics of classification are given: logits and labels, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distill import Batch, DataError


def logits_and_labels(metric: str, output: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, K) and labels int64 (N), one row for each label.

    Takes logits (B, K) or (B, K, H, W, ...), or (B, T, V) unless only dimension 1 fits the labels,
    and labels int64 of that shape without classes; logits below float32 become float32. Of an
    output with several parts, the one called ``logits`` or ``out`` is taken.

    Raises:
        DataError: if the output is no tensor of logits that fits the labels; it names ``metric``.
    """
    targets = batch.targets
    output = predicted(output)
    if not isinstance(output, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise DataError(f"{metric} needs logits and labels as tensors")
    if output.dim() < 2:
        raise DataError(f"{metric} needs logits (B, K), got shape {tuple(output.shape)}")
    if output.dim() == 3 and targets.shape == output.shape[:2]:
        output = output.movedim(2, 1)
    expected = (output.shape[0], *output.shape[2:])
    if tuple(targets.shape) != expected or targets.is_floating_point():
        raise DataError(
            f"{metric} needs labels of shape {expected} for logits {tuple(output.shape)}, "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    rows = output.movedim(1, -1).reshape(-1, output.shape[1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide), targets.reshape(-1).long()


def predicted(output: Any) -> Any:
    """Return the part called ``logits`` or ``out`` of an output that has such parts."""
    if isinstance(output, Mapping):
        return next((output[name] for name in ("logits", "out") if name in output), output)
    return output


def sum_type(device: torch.device) -> torch.dtype:
    """Return the type to add up in: float64, or float32 on ``mps``, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
