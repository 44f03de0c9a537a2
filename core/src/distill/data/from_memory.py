"""Batches of samples that are in memory, as they would come if they were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distill import randomness
from distill.data.batch import Batch
from distill.data.kept import Kept, Place
from distill.data.plan import Key
from distill.data.reading_samples import EVALUATION, LONGEST_GAP, EpochReading
from distill.errors import DataError


def batch_from_memory(
    kept: Kept, keys: Sequence[Key], how: EpochReading, *, pin_memory: bool
) -> Batch:
    """Return a batch of samples that are in memory.

    Args:
        kept: the data.
        keys: of the samples.
        how: they come to be.
        pin_memory: whether to put what is on the host into page-locked memory.

    Raises:
        DataError: if too many samples in a row could not be read, or a transform fails.
    """
    found = [_readable(kept, key, how) for key in keys]
    index = [own for own, _, _ in found if own is not None]
    times = [time for own, time, _ in found if own is not None]
    skipped = tuple(pair for _, _, pairs in found for pair in pairs)
    if not index:
        return Batch(None, None, torch.empty(0, dtype=torch.long), skipped=skipped)
    place = _view_place() if how.has_views else _epoch_place(how)
    batch = kept.batch(index, times, place)
    if how.fingerprints is not None:
        taken = kept.fingerprints(batch, times, place, whole=how.fingerprints == "all")
        batch = replace(batch, fingerprint=torch.tensor(taken))
    view = torch.tensor(times) if how.has_views else None
    batch = replace(batch, skipped=skipped, view=view)
    return batch.pin_memory() if pin_memory and kept.device.type == "cpu" else batch


def _readable(
    kept: Kept, key: Key, how: EpochReading
) -> tuple[int | None, int, list[tuple[int, str]]]:
    """Return the sample to take, if any, the time or view that it comes as, and what is skipped.

    As where samples are read, the next one that can be read stands in while training.
    """
    index, time = key
    skipped: list[tuple[int, str]] = []
    while index in kept.bad:
        skipped.append((index, kept.bad[index]))
        if how.epoch == EVALUATION:
            return None, time, skipped
        if len(skipped) == min(LONGEST_GAP, len(kept)):
            raise DataError(f"{len(skipped)} samples in a row cannot be read: {skipped[-1][1]}")
        index = (index + 1) % len(kept)
    return index, -1 - key[0] if skipped and not how.has_views else time, skipped


def _epoch_place(how: EpochReading) -> Place:
    def seed(index: int, time: int, number: int) -> None:
        randomness.seed_sample(randomness.derive(how.seed, "run", number), how.epoch, index, time)

    return Place(randomness.derive(how.seed, "augment", how.epoch), seed)


def _view_place() -> Place:
    def seed(index: int, view: int, number: int) -> None:
        randomness.seed_view(index, view, number)

    return Place(randomness.derive(0, "augment"), seed)
