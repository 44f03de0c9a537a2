"""Data set -> batches of this process, each sample seeded by its position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import sleep
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from distill import distributed, randomness
from distill.data.batch import Batch, Sample
from distill.data.plan import Key, Plan
from distill.data.source import Source
from distill.data.worker_reading import IDLE, Reading
from distill.errors import DataError

EVALUATION = -1
"""The epoch that evaluation draws as."""
HANDLED_WITHIN = 0.5
"""Seconds within which the system tells of a worker's end."""
LONGEST_GAP = 100
"""So many unreadable samples in a row end a run that skips them."""


@dataclass(frozen=True)
class Loading:
    """How samples are read.

    Attributes:
        workers: loader processes of this process.
        prefetch: batches each of them prepares ahead.
        pin_memory: whether batches lie in page-locked memory.
        timeout: seconds to wait for a worker.
        on_bad_sample: what becomes of one that cannot be read. Skipped while training, its place
            goes to the next one of the data set that can be read, so that all processes still
            take equal steps; skipped in an evaluation, it does not count.
    """

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    timeout: float = 600
    on_bad_sample: Literal["raise", "skip"] = "raise"


def training_batches(
    source: Source,
    plan: Plan,
    loading: Loading = Loading(),
    *,
    seed: int,
    epoch: int,
    lead: int = 0,
) -> Iterator[Batch]:
    """Yield this process's part of each global batch of one epoch.

    Raises:
        DataError: if a sample cannot be read or put into a batch, or a worker dies or hangs.
    """
    parts = list(plan.parts(seed, epoch, lead))
    batches = _batches(source, [part.keys for part in parts], loading, seed, epoch)
    for batch, part in zip(batches, parts, strict=True):
        yield replace(
            batch, share=part.share, lead=part.lead, ends_step=part.ends_step, sizes=part.sizes
        )


def evaluation_batches(
    source: Source,
    batch_size: int,
    loading: Loading = Loading(),
    *,
    seed: int,
    in_step: bool = False,
) -> Iterator[Batch]:
    """Yield this process's part of the data set in its own order; no sample counts twice.

    A batch of which no sample can be read is empty. With ``in_step`` all processes get the same
    number of batches to run: those that have no sample left, or none that can be read, get one with
    a share of 0, which is to be run and not counted.

    Raises:
        DataError: as ``training_batches``; with ``in_step`` also if a process can read nothing.
    """
    world, rank = distributed.world_size(), distributed.rank()
    local = max(1, batch_size // world)
    own = range(rank, len(source), world)
    parts = [[(i, 0) for i in own[start : start + local]] for start in range(0, len(own), local)]
    most = -(-len(range(0, len(source), world)) // local)  # of process 0
    fill = most - len(parts) if in_step else 0
    batches = _batches(source, [*parts, *[[(0, 0)]] * fill], loading, seed, EVALUATION)
    before: Batch | None = None
    for number, batch in enumerate(batches):
        if in_step and (number >= len(parts) or len(batch) == 0):
            stand_in = batch if len(batch) else before
            if stand_in is None:
                raise DataError(f"data set '{source.name}': no sample of a batch can be read")
            skipped = batch.skipped if number < len(parts) else ()
            yield replace(stand_in, share=0.0, skipped=skipped)
        else:
            yield batch
        before = batch if len(batch) else before


def sample_batch(
    source: Source, size: int, seed: int, on_bad_sample: Literal["raise", "skip"] = "raise"
) -> Batch:
    """Return the first ``size`` samples, or as many as there are."""
    keys = [(index, 0) for index in range(min(size, len(source)))]
    return next(_batches(source, [keys], Loading(on_bad_sample=on_bad_sample), seed, 0))


@dataclass(frozen=True)
class _Item:
    """A sample, what stands in for an unreadable one, or the reason why there is none.

    An error is handed on as a value: raised in a worker, it would arrive wrapped in a traceback.
    """

    sample: Sample | None
    error: str = ""
    skipped: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class _Seeded(Dataset[_Item]):
    """A source whose samples look the same whenever they are read at one place of the run."""

    source: Source
    seed: int
    epoch: int
    skips: bool
    reading: Reading

    def __getitem__(self, key: Key) -> _Item:
        skipped: list[tuple[int, str]] = []
        index, repeat = key
        while True:
            self.reading.note(index)
            # One that stands in is not to look as in its own place.
            place = -1 - key[0] if skipped else repeat
            randomness.seed_sample(self.seed, self.epoch, index, place)
            try:
                return _Item(self.source.read(index), skipped=tuple(skipped))
            except DataError as error:
                if not self.skips:
                    return _Item(None, str(error))
                skipped.append((index, str(error)))
            finally:
                self.reading.note(IDLE)
            if self.epoch == EVALUATION:
                return _Item(None, skipped=tuple(skipped))
            if len(skipped) == min(LONGEST_GAP, len(self.source)):
                return _Item(
                    None, f"{len(skipped)} samples in a row cannot be read: {skipped[-1][1]}"
                )
            index = (index + 1) % len(self.source)


def _batches(
    source: Source, parts: list[list[Key]], loading: Loading, seed: int, epoch: int
) -> Iterator[Batch]:
    reading = Reading(loading.workers)
    loader = DataLoader(
        _Seeded(source, seed, epoch, loading.on_bad_sample == "skip", reading),
        batch_sampler=parts,
        num_workers=loading.workers,
        collate_fn=_Collate(source),
        pin_memory=loading.pin_memory,
        timeout=loading.timeout if loading.workers else 0,
        prefetch_factor=loading.prefetch if loading.workers else None,
        generator=torch.Generator().manual_seed(0),  # or the loader draws from the global one
    )
    iterator = iter(loader)
    try:
        yield from _read(iterator, source, reading, loading)
    finally:
        # Else workers live on for as long as an error's traceback refers to them.
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _read(
    iterator: Iterator[Any], source: Source, reading: Reading, loading: Loading
) -> Iterator[Batch]:
    while True:
        try:
            try:
                batch = next(iterator)
            except (OSError, EOFError):  # a worker died and took with it what it had sent
                sleep(HANDLED_WITHIN)  # torch's handler of its end raises here, and says why
                raise
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            text = reading.explain(error, loading.timeout)
            raise DataError(f"data set '{source.name}': {text}") from error
        if isinstance(batch, DataError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Collate:
    """Puts samples together; picklable, and names the data set in errors."""

    source: Source

    def __call__(self, items: list[_Item]) -> Batch | DataError:
        errors = [item.error for item in items if item.error]
        samples = [item.sample for item in items if item.sample is not None]
        skipped = tuple(pair for item in items for pair in item.skipped)
        if errors:
            return DataError(errors[0])
        if not samples:
            return Batch(None, None, torch.empty(0, dtype=torch.long), skipped=skipped)
        try:
            batch: Any = self.source.collate(samples)
        except (TypeError, RuntimeError, ValueError, LookupError) as error:
            return DataError(
                f"data set '{self.source.name}': samples cannot be put into a batch: "
                + _collate_hint(samples[0].input, error)
            )
        if not isinstance(batch, Batch):
            kind = type(self.source.collate).__name__
            return DataError(
                f"{kind} gave {type(batch).__name__}; a collate function gives a Batch"
            )
        return replace(batch, skipped=skipped) if skipped else batch


def _collate_hint(value: Any, error: Exception) -> str:
    if type(value).__module__.split(".")[0] == "PIL":
        return "its inputs are PIL images; end its transforms with ToImage and ToDtype"
    if isinstance(error, KeyError):
        return f"not every sample has the key {error}"
    return str(error).split("\n")[0]
