"""Data set -> batches of this process, each sample seeded by its position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import sleep
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from distill import distributed
from distill.data.batch import Batch
from distill.data.collating import CollateItems
from distill.data.from_memory import batch_from_memory
from distill.data.kept import Kept
from distill.data.plan import Key, Plan
from distill.data.reading_samples import EVALUATION, EpochReading, Fingerprints, SeededSamples
from distill.data.source import Source
from distill.data.worker_reading import Reading
from distill.errors import DataError

HANDLED_WITHIN = 0.5
"""Seconds within which the system tells of a worker's end."""


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
    fingerprints: Fingerprints | None = None,
) -> Iterator[Batch]:
    """Yield this process's part of each global batch of one epoch.

    Args:
        source: the data.
        plan: which samples in which batch.
        loading: how they are read.
        seed: of the run.
        epoch: of the stage, from 0.
        lead: samples of the neighbouring part that each part needs in front.
        fingerprints: of what in each sample a fingerprint is taken, ``None`` for none.

    Raises:
        DataError: if a sample cannot be read or put into a batch, or a worker dies or hangs.
    """
    parts = list(plan.parts(seed, epoch, lead))
    keys = [part.keys for part in parts]
    how = EpochReading(seed, epoch, plan.views is not None, plan.views_at_once > 1, fingerprints)
    batches = _batches(source, keys, loading, how)
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
    keys = [*parts, *[[(0, 0)]] * fill]
    batches = _batches(source, keys, loading, EpochReading(seed, EVALUATION))
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
    source: Source,
    size: int,
    seed: int,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    *,
    views: bool = False,
    first: int = 0,
) -> Batch:
    """Return ``size`` samples from one on, or as many as there are; of fixed views the first."""
    keys = [(index, 0) for index in range(first, min(first + size, len(source)))]
    loading = Loading(on_bad_sample=on_bad_sample)
    return next(_batches(source, [keys], loading, EpochReading(seed, 0, views)))


def every_sample(source: Source, size: int, loading: Loading) -> Iterator[Batch]:
    """Yield all samples in order, on every process, for what draws nothing.

    The generators are restarted for each of them, so that ``has_drawn`` tells whether it drew.

    Raises:
        DataError: as ``training_batches``.
    """
    keys = [(index, 0) for index in range(len(source))]
    parts = [keys[first : first + size] for first in range(0, len(keys), size)]
    yield from _batches(source, parts, loading, EpochReading(0, EVALUATION, at_one_place=True))


def _batches(
    source: Source, parts: list[list[Key]], loading: Loading, how: EpochReading
) -> Iterator[Batch]:
    if isinstance(source, Kept):
        for keys in parts:
            yield batch_from_memory(source, keys, how, pin_memory=loading.pin_memory)
        return
    reading = Reading(loading.workers)
    loader = DataLoader(
        SeededSamples(source, how, loading.on_bad_sample == "skip", reading),
        batch_sampler=parts,
        num_workers=loading.workers,
        collate_fn=CollateItems(source),
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
