"""Data set -> batches of this process, each sample seeded by its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from distill import distributed, randomness
from distill.data.batch import Batch, Sample, collate
from distill.errors import DataError

WORKER_TIMEOUT = 600
"""Seconds after which a loader worker that gives nothing ends the run."""


@dataclass(frozen=True)
class Source:
    """A named data set with its transforms, ready to be read.

    Attributes:
        name: its name in the experiment file.
        dataset: items are ``(input, target)`` or ``Sample``.
        transforms: applied to the input in order.
    """

    name: str
    dataset: Any
    transforms: Sequence[Callable[[Any], Any]] = ()

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes if the data set tells them."""
        classes = getattr(self.dataset, "classes", None)
        if isinstance(classes, (list, tuple)) and all(isinstance(c, str) for c in classes):
            return list(classes)
        return None

    def read(self, index: int) -> Sample:
        """Return one sample, transformed.

        Raises:
            DataError: if the data set or a transform fails; the message names the sample.
        """
        try:
            item = self.dataset[index]
            sample = item if isinstance(item, Sample) else Sample(item[0], item[1])
            value = sample.input
            for transform in self.transforms:
                value = transform(value)
        except Exception as error:
            raise DataError(
                f"data set '{self.name}': sample {index} cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error
        return replace(sample, input=value, index=index)


@dataclass(frozen=True)
class _Seeded(Dataset[Sample | DataError]):
    """A source whose sample ``index`` looks the same whenever it is read in this epoch.

    An error is handed on as a value: raised in a worker, it would arrive wrapped in a traceback.
    """

    source: Source
    seed: int
    epoch: int

    def __getitem__(self, index: int) -> Sample | DataError:
        randomness.seed_sample(self.seed, self.epoch, index)
        try:
            return self.source.read(index)
        except DataError as error:
            return DataError(str(error))


@dataclass(frozen=True)
class Plan:
    """Which samples each process sees in which step; the same on every process.

    Attributes:
        size: samples in the data set.
        batch_size: the global one.
        drop_last: whether to leave out an incomplete last batch.
    """

    size: int
    batch_size: int
    drop_last: bool = False

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full + bool(rest and not self.drop_last)

    def order(self, seed: int, epoch: int) -> list[int]:
        """Return the epoch's permutation of the samples."""
        generator = torch.Generator().manual_seed(randomness.derive(seed, "order", epoch))
        return torch.randperm(self.size, generator=generator).tolist()

    def batches(self, seed: int, epoch: int, first_step: int = 0) -> list[list[int]]:
        """Return the samples of each global batch from ``first_step`` on."""
        order = self.order(seed, epoch)
        starts = range(first_step * self.batch_size, self.size, self.batch_size)
        return [order[s : s + self.batch_size] for s in starts][: self.steps - first_step]


def training_batches(
    source: Source,
    plan: Plan,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this process's part of each global batch of one epoch."""
    parts = [_share(batch) for batch in plan.batches(seed, epoch, first_step)]
    loader = _loader(source, [part for part, _ in parts], seed, epoch, workers, pin_memory)
    for batch, (_, share) in zip(_batches(loader), parts, strict=True):
        yield batch if share == 1.0 else replace(batch, share=share)


def evaluation_batches(
    source: Source, batch_size: int, *, seed: int, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield this process's part of the data set in its own order; no sample comes twice."""
    own = range(distributed.rank(), len(source), distributed.world_size())
    local = max(1, batch_size // distributed.world_size())
    parts = [list(own[start : start + local]) for start in range(0, len(own), local)]
    return _batches(_loader(source, parts, seed, -1, workers, pin_memory))


def sample_batch(source: Source, size: int, seed: int) -> Batch:
    """Return the first ``size`` samples, or as many as there are."""
    loader = _loader(source, [list(range(min(size, len(source))))], seed, 0, 0, False)
    return next(_batches(loader))


def _share(batch: list[int]) -> tuple[list[int], float]:
    """Return this process's samples of a global batch and their weight.

    A process for which a trailing batch has nothing left takes a sample with weight zero, so that
    all processes take the same number of steps.
    """
    world = distributed.world_size()
    own = batch[distributed.rank() :: world]
    return (own, len(own) * world / len(batch)) if own else (batch[:1], 0.0)


def _loader(
    source: Source,
    parts: list[list[int]],
    seed: int,
    epoch: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    return DataLoader(
        _Seeded(source, seed, epoch),
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=_Collate(source.name),
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT if workers else 0,
        generator=torch.Generator().manual_seed(0),  # or the loader draws from the global one
    )


def _batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:  # a worker died or hangs
            text = str(error).splitlines()[0]
            raise DataError(f"data set '{loader.dataset.source.name}': {text}") from error  # type: ignore[attr-defined]
        if isinstance(batch, DataError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Collate:
    """Puts samples together; picklable, and names the data set in errors."""

    name: str

    def __call__(self, samples: list[Sample | DataError]) -> Batch | DataError:
        good = []
        for sample in samples:
            if isinstance(sample, DataError):
                return sample
            good.append(sample)
        try:
            return collate(good)
        except (TypeError, RuntimeError, ValueError, LookupError) as error:
            return DataError(
                f"data set '{self.name}': samples cannot be put into a batch: "
                + _collate_hint(good[0].input, error)
            )


def _collate_hint(value: Any, error: Exception) -> str:
    if type(value).__module__.split(".")[0] == "PIL":
        return "its inputs are PIL images; end its transforms with ToImage and ToDtype"
    if isinstance(error, KeyError):
        return f"not every sample has the key {error}"
    return str(error).split("\n")[0]
