"""Classification accuracy."""

from __future__ import annotations

from typing import Any

import torch

from distill import Batch, DataError, Metric
from distill.builtin.logits import logits_and_labels


def accuracy(top_k: int = 1) -> Metric:
    """Return the share of samples whose label is among the ``top_k`` highest logits.

    Takes logits (B, K) or (B, K, ...) and labels int64 (B) or (B, ...); negative labels do not
    count. Gives a fraction between 0 and 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return Accuracy(top_k)


class Accuracy:
    """Counts hits and labels; the counts stay on the device until they are asked for."""

    def __init__(self, top_k: int):
        self.top_k = self.classes_needed = top_k
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._hits: int | torch.Tensor = 0
        self._labels: int | torch.Tensor = 0

    def update(self, output: Any, batch: Batch) -> None:
        """Count a batch.

        Raises:
            DataError: if the output is no tensor of logits that fits the labels, or of fewer than
                ``top_k`` classes.
        """
        logits, labels = logits_and_labels("accuracy", output, batch)
        classes = logits.shape[1]
        if self.top_k > classes:
            raise DataError(
                f"counts the first {self.top_k} of {classes} classes, which is all: write a "
                "smaller top_k"
            )
        top = logits.topk(self.top_k, dim=1).indices
        self._hits = self._hits + (top == labels.unsqueeze(1)).sum()
        self._labels = self._labels + (labels >= 0).sum()

    def state(self) -> tuple[int, int]:
        """Return hits and labels counted so far."""
        return int(self._hits), int(self._labels)

    def merge(self, state: tuple[int, int]) -> None:
        """Add another process's counts."""
        self._hits = self._hits + state[0]
        self._labels = self._labels + state[1]

    def compute(self) -> float:
        """Return hits over labels, 0 where there are no labels."""
        hits, labels = self.state()
        return hits / labels if labels else 0.0
