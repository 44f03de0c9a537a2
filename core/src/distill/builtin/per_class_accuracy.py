"""Classification accuracy of each class."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from distill import Batch, DataError
from distill.builtin.logits import logits_and_labels


def per_class_accuracy() -> PerClassAccuracy:
    """Return the share of each class's samples that are predicted as it, and the mean of classes.

    Takes logits (B, K) or (B, K, ...) and labels int64 (B) or (B, ...); negative labels do not
    count. Gives fractions between 0 and 1 by class, with their plain mean as ``mean`` in front (0
    where there are no labels). Classes without a sample are left out of both.

    A class goes by its name in the data set, or by its label if that tells no names; where several
    have one name, or one is called ``mean``, the label follows: ``crane (134)``.
    """
    return PerClassAccuracy()


class PerClassAccuracy:
    """Counts hits and samples by class; the counts stay on the device until they are asked for.

    Attributes:
        classes: names by label, set from the data set before an evaluation; ``None`` if it has
            none.
    """

    classes: list[str] | None = None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what has been counted; the names stay."""
        self._counts: torch.Tensor | None = None

    def update(self, output: Any, batch: Batch) -> None:
        """Count a batch.

        Raises:
            DataError: if the output is no tensor of logits that fits the labels.
        """
        logits, labels = logits_and_labels("per_class_accuracy", output, batch)
        classes = logits.shape[1]
        # The first place takes labels that do not count, the last one those of no class.
        places = labels.clamp(-1, classes) + 1
        hits = (logits.argmax(1) == labels).long()
        counts = torch.zeros(2, classes + 2, dtype=torch.int64, device=logits.device)
        counts.index_add_(1, places, torch.stack([hits, torch.ones_like(hits)]))
        self._add(counts)

    def state(self) -> list[list[int]] | None:
        """Return hits and samples by class so far; ``None`` if nothing has been seen."""
        return None if self._counts is None else self._counts.tolist()

    def merge(self, state: list[list[int]] | None) -> None:
        """Add another process's counts."""
        if state is not None:
            self._add(torch.tensor(state))

    def compute(self) -> dict[str, float]:
        """Return the mean over classes as ``mean``, and the accuracy of each class by name.

        Raises:
            DataError: if there was a label of no class.
        """
        if self._counts is None:
            return {"mean": 0.0}
        hits, samples = self._counts.tolist()
        if samples[-1]:
            raise DataError(
                f"per_class_accuracy: {samples[-1]} labels are beyond the {len(samples) - 2} "
                "classes of the logits"
            )
        shares = {
            label: hit / count
            for label, (hit, count) in enumerate(zip(hits[1:-1], samples[1:-1], strict=True))
            if count
        }
        mean = sum(shares.values()) / len(shares) if shares else 0.0
        names = self._names(len(samples) - 2)
        return {"mean": mean, **{names[label]: share for label, share in shares.items()}}

    def _add(self, counts: torch.Tensor) -> None:
        self._counts = counts if self._counts is None else self._counts.to(counts) + counts

    def _names(self, count: int) -> list[str]:
        given = list(self.classes or [])[:count]
        names = [*given, *map(str, range(len(given), count))]
        often = Counter([*names, "mean"])
        return [f"{n} ({label})" if often[n] > 1 else n for label, n in enumerate(names)]
