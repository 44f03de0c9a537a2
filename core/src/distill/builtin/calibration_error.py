"""How far a model's confidence is from its accuracy."""

from __future__ import annotations

from typing import Any, Literal

import torch

from distill import Batch, Metric
from distill.builtin.logits import logits_and_labels, sum_type


def calibration_error(bins: int = 15, norm: Literal["l1", "max"] = "l1") -> Metric:
    """Return the calibration error of the highest probability of softmax.

    Samples are sorted by confidence, the probability of the predicted class, into bins of equal
    width; bin m of M holds confidences above (m - 1) / M up to m / M. The error of a bin is the
    difference between its accuracy and its mean confidence. ``l1`` (expected calibration error) is
    the mean over samples of their bin's error, ``max`` (maximum calibration error) the largest
    error of a bin that is not empty.

    Takes logits (B, K) or (B, K, ...) and labels int64 (B) or (B, ...); negative labels do not
    count. Gives a fraction between 0 and 1, 0 where there are no labels; lower is better.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equations 3 and 5.

    Raises:
        ValueError: if ``bins`` is below 1 or ``norm`` is unknown.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if norm not in ("l1", "max"):
        raise ValueError(f"norm must be l1 or max, got {norm!r}")
    return CalibrationError(bins, norm)


class CalibrationError:
    """Adds up samples, hits and confidence by bin; the sums stay on the device till asked for."""

    higher_is_better = False

    def __init__(self, bins: int, norm: str):
        self.bins, self.norm = bins, norm
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums = torch.zeros(3, self.bins, dtype=torch.float64)

    def update(self, output: Any, batch: Batch) -> None:
        """Sort a batch into the bins.

        Raises:
            DataError: if the output is no tensor of logits that fits the labels.
        """
        logits, labels = logits_and_labels("calibration_error", output, batch)
        confidence, predicted = logits.softmax(1).max(1)
        counted = labels >= 0
        confidence = torch.where(counted, confidence, 0.0)
        rows = torch.stack([counted, predicted == labels, confidence]).to(sum_type(logits.device))
        numbers = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1
        sums = [(rows * (numbers == number)).sum(1) for number in range(self.bins)]
        self._sums = self._sums.to(rows) + torch.stack(sums, 1)

    def state(self) -> list[list[float]]:
        """Return samples, hits and summed confidence, each by bin."""
        sums: list[list[float]] = self._sums.tolist()
        return sums

    def merge(self, state: list[list[float]]) -> None:
        """Add another process's sums."""
        self._sums = self._sums.cpu().double() + torch.tensor(state, dtype=torch.float64)

    def compute(self) -> float:
        """Return the error over everything seen, 0 where there are no labels."""
        samples, hits, confidence = self._sums.cpu().double()
        if not samples.any():
            return 0.0
        gaps = (hits - confidence).abs()
        if self.norm == "l1":
            return float(gaps.sum() / samples.sum())
        return float((gaps / samples.clamp(min=1)).max())
