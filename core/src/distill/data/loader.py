"""Data set -> batches of this process, each sample seeded by its position."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from time import sleep
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from distill import distributed, randomness
from distill.data.batch import Batch, Sample
from distill.data.batched import Pending
from distill.data.fingerprint import fingerprint
from distill.data.kept import Kept, Place
from distill.data.plan import Key, Plan
from distill.data.source import Source, alike
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
    how = _Reading(seed, epoch, plan.views is not None, plan.views_at_once > 1, fingerprints)
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
    batches = _batches(source, keys, loading, _Reading(seed, EVALUATION))
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
) -> Batch:
    """Return the first ``size`` samples, or as many as there are; of fixed views the first."""
    keys = [(index, 0) for index in range(min(size, len(source)))]
    loading = Loading(on_bad_sample=on_bad_sample)
    return next(_batches(source, [keys], loading, _Reading(seed, 0, views)))


Fingerprints = Literal["inputs", "all"]
"""What of a sample a fingerprint is of: its inputs, or targets and extras too."""


@dataclass(frozen=True)
class _Reading:
    """How the samples of an epoch come to be.

    Attributes:
        has_views: whether keys name fixed views of samples.
        reads_once: whether views of one sample that follow one another share its reading.
    """

    seed: int
    epoch: int
    has_views: bool = False
    reads_once: bool = False
    fingerprints: Fingerprints | None = None


@dataclass(frozen=True)
class _Item:
    """A sample, what stands in for an unreadable one, or the reason why there is none.

    An error is handed on as a value: raised in a worker, it would arrive wrapped in a traceback.
    """

    sample: Sample | None
    error: str = ""
    skipped: tuple[tuple[int, str], ...] = ()
    view: int | None = None
    fingerprint: int | None = None
    left: int = 0  # transforms that are still to be applied


@dataclass(frozen=True)
class _Seeded(Dataset[_Item]):
    """A source whose samples look the same whenever they are read at one place of the run."""

    source: Source
    how: _Reading
    skips: bool
    reading: Reading
    latest: dict[int, Sample] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> _Item:
        skipped: list[tuple[int, str]] = []
        index, repeat = key
        while True:
            self.reading.note(index)
            try:
                return self._item(index, repeat, -1 - key[0] if skipped else repeat, skipped)
            except DataError as error:
                if not self.skips:
                    return _Item(None, str(error))
                skipped.append((index, str(error)))
            finally:
                self.reading.note(IDLE)
            if self.how.epoch == EVALUATION:
                return _Item(None, skipped=tuple(skipped))
            if len(skipped) == min(LONGEST_GAP, len(self.source)):
                return _Item(
                    None, f"{len(skipped)} samples in a row cannot be read: {skipped[-1][1]}"
                )
            index = (index + 1) % len(self.source)

    def _item(self, index: int, view: int, place: int, skipped: list[tuple[int, str]]) -> _Item:
        """Read a sample; one that stands in, at a place of its own, is not to look as in its own.

        Of a fixed view there is but one look.
        """
        how = self.how
        if how.has_views:
            raw = self._raw(index)
            randomness.seed_view(index, view)
            sample, left = self.source.begun(raw, index)
        else:
            randomness.seed_sample(how.seed, how.epoch, index, place)
            sample, left = self.source.begun(self.source.untransformed(index), index)
        taken = None
        if how.fingerprints is not None:
            more = (sample.target, sample.extras) if how.fingerprints == "all" else ()
            taken = fingerprint((sample.input, *more))
        own = view if how.has_views else None
        return _Item(sample, "", tuple(skipped), own, taken, left)

    def _raw(self, index: int) -> Sample:
        if index not in self.latest:
            randomness.seed_reading(index)
            raw = self.source.untransformed(index)
            if not self.how.reads_once:
                return raw
            self.latest.clear()
            self.latest[index] = raw
        return _copied(self.latest[index])


def _copied(sample: Sample) -> Sample:
    """Return a sample whose values a transform may write into."""

    def own(value: Any) -> Any:
        # An image of PIL's by its own method, which takes a tenth of the time.
        is_image = type(value).__module__.partition(".")[0] == "PIL"
        return value.copy() if is_image else copy.deepcopy(value)

    return replace(sample, input=own(sample.input), target=own(sample.target))


def _batches(
    source: Source, parts: list[list[Key]], loading: Loading, how: _Reading
) -> Iterator[Batch]:
    if isinstance(source, Kept):
        for keys in parts:
            yield _from_memory(source, keys, loading, how)
        return
    reading = Reading(loading.workers)
    loader = DataLoader(
        _Seeded(source, how, loading.on_bad_sample == "skip", reading),
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


def _from_memory(kept: Kept, keys: list[Key], loading: Loading, how: _Reading) -> Batch:
    """Return a batch of samples that are in memory."""
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
    return batch.pin_memory() if loading.pin_memory and kept.device.type == "cpu" else batch


def _readable(kept: Kept, key: Key, how: _Reading) -> tuple[int | None, int, list[tuple[int, str]]]:
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


def _epoch_place(how: _Reading) -> Place:
    def seed(index: int, time: int, number: int) -> None:
        randomness.seed_sample(randomness.derive(how.seed, "run", number), how.epoch, index, time)

    return Place(randomness.derive(how.seed, "augment", how.epoch), seed)


def _view_place() -> Place:
    def seed(index: int, view: int, number: int) -> None:
        randomness.seed_view(index, view, number)

    return Place(randomness.derive(0, "augment"), seed)


def every_sample(source: Source, size: int, loading: Loading) -> Iterator[Batch]:
    """Yield all samples in order, on every process, for what draws nothing.

    Raises:
        DataError: as ``training_batches``.
    """
    keys = [(index, 0) for index in range(len(source))]
    parts = [keys[first : first + size] for first in range(0, len(keys), size)]
    yield from _batches(source, parts, loading, _Reading(0, EVALUATION))


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
                + _collate_hint(samples[0].input, error)
            )
        if not isinstance(batch, Batch):
            kind = type(self.source.collate).__name__
            return DataError(
                f"{kind} gave {type(batch).__name__}; a collate function gives a Batch"
            )
        batch = replace(batch, pending=pending) if pending is not None else batch
        return self._placed(batch, [item for item in items if item.sample is not None], skipped)

    def _whole(self, item: _Item) -> Sample:
        assert item.sample is not None
        return self.source.finished(item.sample, item.left)

    def _placed(
        self, batch: Batch, items: list[_Item], skipped: tuple[tuple[int, str], ...]
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


def _collate_hint(value: Any, error: Exception) -> str:
    if type(value).__module__.split(".")[0] == "PIL":
        return "its inputs are PIL images; end its transforms with ToImage and ToDtype"
    if isinstance(error, KeyError):
        return f"not every sample has the key {error}"
    return str(error).split("\n")[0]
