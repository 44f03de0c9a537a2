"""Samples that have been read -> a batch, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from distill.data.batch import Batch, Sample
from distill.data.batched import Pending
from distill.data.reading_samples import Item
from distill.data.source import Source, alike
from distill.errors import DataError


@dataclass(frozen=True)
class CollateItems:
    """Puts samples together; picklable, and names the data set in errors."""

    source: Source

    def __call__(self, items: list[Item]) -> Batch | DataError:
        errors = [item.error for item in items if item.error]
        samples = [item.sample for item in items if item.sample is not None]
        skipped = tuple(pair for item in items for pair in item.skipped)
        if errors:
            return DataError(errors[0])
        if not samples:
            return Batch(None, None, torch.empty(0, dtype=torch.long), skipped=skipped)
        pending = None
        left = {item.left for item in items if item.sample is not None}
        if len(left) == 1 and 0 not in left and alike(samples):
            pending = Pending(self.source.name, self.source.late[-max(left) :])
        elif left != {0}:
            try:
                samples = [self._whole(item) for item in items if item.sample is not None]
            except DataError as error:
                return error
        try:
            batch: Any = self.source.collate(samples)
        except (TypeError, RuntimeError, ValueError, LookupError) as error:
            return DataError(
                f"data set '{self.source.name}': samples cannot be put into a batch: "
                + _hint(samples[0].input, error)
            )
        if not isinstance(batch, Batch):
            kind = type(self.source.collate).__name__
            return DataError(
                f"{kind} gave {type(batch).__name__}; a collate function gives a Batch"
            )
        batch = replace(batch, pending=pending) if pending is not None else batch
        return self._placed(batch, [item for item in items if item.sample is not None], skipped)

    def _whole(self, item: Item) -> Sample:
        assert item.sample is not None
        return self.source.finished(item.sample, item.left)

    def _placed(
        self, batch: Batch, items: list[Item], skipped: tuple[tuple[int, str], ...]
    ) -> Batch | DataError:
        """Say of each sample of the batch which view it is and what its fingerprint is."""
        views = [item.view for item in items if item.view is not None]
        fingerprints = [item.fingerprint for item in items if item.fingerprint is not None]
        if not views and not fingerprints:
            return replace(batch, skipped=skipped) if skipped else batch
        order = [item.sample.index for item in items if item.sample is not None]
        if batch.index.tolist() != order:
            kind = type(self.source.collate).__name__
            return DataError(
                f"data set '{self.source.name}': {kind} leaves samples out or changes their order, "
                "so that they cannot be told apart by their views and in a store"
            )
        return replace(
            batch,
            skipped=skipped,
            view=torch.tensor(views) if views else None,
            fingerprint=torch.tensor(fingerprints) if fingerprints else None,
        )


def _hint(value: Any, error: Exception) -> str:
    if type(value).__module__.split(".")[0] == "PIL":
        return "its inputs are PIL images; end its transforms with ToImage and ToDtype"
    if isinstance(error, KeyError):
        return f"not every sample has the key {error}"
    return str(error).split("\n")[0]
