"""How often a model predicts what its teacher predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from distill import Batch, DataError
from distill.builtin.logits import predicted


def agreement(teacher: str = "teacher") -> Agreement:
    """Return the share of samples for which the model and a teacher predict the same class.

    Takes logits (B, K) or (B, K, ...) of both; labels are not looked at. Of equal logits the first
    counts as predicted. Gives a fraction between 0 and 1.

    Args:
        teacher: the role of the teacher in the stage.

    Source: Stanton et al., Does Knowledge Distillation Really Work?, NeurIPS 2021, equation 4.
    """
    return Agreement(teacher)


class Agreement:
    """Counts equal predictions; the counts stay on the device until they are asked for.

    Attributes:
        teacher: the role of the teacher that the model is compared with.
    """

    def __init__(self, teacher: str):
        self.teacher = teacher
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._equal: int | torch.Tensor = 0
        self._all = 0

    def update(self, output: Any, batch: Batch, teachers: Mapping[str, Any]) -> None:
        """Count a batch; ``teachers`` are the outputs of the teachers by role.

        Raises:
            DataError: if there is no such teacher, or the two outputs are no tensors of logits of
                one shape.
        """
        if self.teacher not in teachers:
            raise DataError(
                f"agreement needs the output of the teacher '{self.teacher}'; "
                f"teachers: {', '.join(teachers) or 'none'}"
            )
        output, other = predicted(output), predicted(teachers[self.teacher])
        if not isinstance(output, torch.Tensor) or not isinstance(other, torch.Tensor):
            raise DataError(f"agreement needs logits of the model and of '{self.teacher}'")
        if output.dim() < 2 or output.shape != other.shape:
            raise DataError(
                f"agreement needs logits (B, K) of one shape, got {tuple(output.shape)} and "
                f"{tuple(other.shape)} of '{self.teacher}'"
            )
        classes = 2 if output.dim() == 3 else 1  # (B, T, V)
        same = output.argmax(classes) == other.argmax(classes)
        self._equal = self._equal + same.sum()
        self._all += same.numel()

    def state(self) -> tuple[int, int]:
        """Return equal predictions and all predictions counted so far."""
        return int(self._equal), self._all

    def merge(self, state: tuple[int, int]) -> None:
        """Add another process's counts."""
        self._equal = self._equal + state[0]
        self._all += state[1]

    def compute(self) -> float:
        """Return equal predictions over all, 0 where there are none."""
        equal, predictions = self.state()
        return equal / predictions if predictions else 0.0
