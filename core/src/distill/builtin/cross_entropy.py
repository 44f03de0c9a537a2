"""Mean cross entropy as a metric."""

from __future__ import annotations

from typing import Any

import torch

from distill import Batch, Metric
from distill.builtin.logits import logits_and_labels, sum_type


def cross_entropy() -> Metric:
    """Return the mean of ``-log softmax(logits)[label]`` over labels, in nats.

    Takes logits (B, K) or (B, K, ...) and labels int64 (B) or (B, ...); negative labels do not
    count, and a label of K or above makes it infinite. Gives 0 where there are no labels; lower is
    better.
    """
    return CrossEntropy()


class CrossEntropy:
    """Adds up cross entropy and labels; the sums stay on the device until they are asked for."""

    higher_is_better = False
    is_fraction = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update(self, output: Any, batch: Batch) -> None:
        """Add a batch.

        Raises:
            DataError: if the output is no tensor of logits that fits the labels.
        """
        logits, labels = logits_and_labels("cross_entropy", output, batch)
        known = labels.clamp(0, logits.shape[1] - 1)
        losses = -logits.log_softmax(1).gather(1, known.unsqueeze(1)).squeeze(1)
        losses = torch.where(labels < logits.shape[1], losses, torch.inf)
        counted = labels >= 0
        rows = torch.stack([torch.where(counted, losses, 0.0), counted])
        sums = rows.to(sum_type(rows.device)).sum(1)
        self._sums = self._sums.to(sums) + sums

    def state(self) -> tuple[float, float]:
        """Return summed cross entropy and the number of labels so far."""
        total, labels = self._sums.tolist()
        return total, labels

    def merge(self, state: tuple[float, float]) -> None:
        """Add another process's sums."""
        self._sums = self._sums.cpu().double() + torch.tensor(state, dtype=torch.float64)

    def compute(self) -> float:
        """Return the mean over everything seen."""
        total, labels = self.state()
        return total / labels if labels else 0.0
