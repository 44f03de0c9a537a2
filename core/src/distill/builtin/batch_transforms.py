"""Transforms of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class SmoothLabels:
    """Turns labels into class probabilities with a part of them spread over all classes.

    ``(1 - smoothing) * onehot + smoothing / num_classes``, float32; targets that are probabilities
    already take the place of ``onehot`` and keep their type.

    Args:
        num_classes: K.
        smoothing: from 0 to 1.

    Raises:
        ValueError: if the parameters are out of range; when called, if targets are neither labels
            int64 (B) from 0 to K - 1 nor probabilities (B, K).

    Source: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
    section 7.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.1):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must be from 0 to 1, got {smoothing}")
        self.num_classes, self.smoothing = num_classes, smoothing

    def __call__(self, inputs: Any, targets: Any) -> tuple[Any, torch.Tensor]:
        """Return inputs as they are, and probabilities (B, K)."""
        hard = self._probabilities(targets)
        return inputs, (1 - self.smoothing) * hard + self.smoothing / self.num_classes

    def _probabilities(self, targets: Any) -> torch.Tensor:
        if not isinstance(targets, torch.Tensor):
            raise ValueError(
                f"SmoothLabels needs targets as a tensor, got {type(targets).__name__}"
            )
        if targets.is_floating_point() and targets.dim() == 2:
            if targets.shape[1] == self.num_classes:
                return targets
        elif targets.dtype == torch.int64 and targets.dim() == 1:
            if ((targets >= 0) & (targets < self.num_classes)).all():
                return functional.one_hot(targets, self.num_classes).float()
            wrong = targets[(targets < 0) | (targets >= self.num_classes)][0]
            raise ValueError(f"SmoothLabels of {self.num_classes} classes got label {int(wrong)}")
        raise ValueError(
            f"SmoothLabels needs labels int64 (B) or probabilities (B, {self.num_classes}), "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
