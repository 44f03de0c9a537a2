"""A data set whose samples lie in memory as they are before augmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils.data import default_collate

from distill import randomness
from distill.data.batch import Batch
from distill.data.batched import BatchedTransform, Pending
from distill.data.fingerprint import fingerprint
from distill.data.source import Source
from distill.errors import DataError


@dataclass(frozen=True)
class Whole:
    """Transforms, one after the other, that whole batches go through."""

    transforms: Sequence[BatchedTransform]
    names: Sequence[str]

    @property
    def draws(self) -> int:
        """Numbers that they need for an input."""
        return sum(transform.draws for transform in self.transforms)


@dataclass(frozen=True)
class OneByOne:
    """Transforms that the inputs of a batch go through by themselves, as they are of ``kind``."""

    transforms: Sequence[Callable[[Any], Any]]
    names: Sequence[str]
    kind: type


@dataclass(frozen=True)
class Place:
    """What draws for a batch depend on besides its samples.

    Attributes:
        base: a seed for draws of whole batches.
        seed: seeds what the transforms of one sample draw from, given its index, which time it
            comes, and the number of the run of transforms.
    """

    base: int
    seed: Callable[[int, int, int], None]


@dataclass(frozen=True, eq=False)
class Kept(Source):
    """A source of which every sample is in memory; ``read`` still reads one as it is on disk.

    Attributes:
        inputs: a tensor (N * views, ...), or several in mappings and lists.
        targets: as a batch of all samples has them.
        extras: the same.
        views: inputs of a sample.
        bad: index -> why that sample could not be read.
        steps: what the inputs of a batch go through.
        before: names of the transforms that they have gone through.
        nbytes: memory that it takes.
    """

    inputs: Any = None
    targets: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    views: int = 1
    bad: Mapping[int, str] = field(default_factory=dict)
    steps: Sequence[Whole | OneByOne] = ()
    before: Sequence[str] = ()
    nbytes: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hashes: dict[tuple[int, bool], int] = field(default_factory=dict)

    def batch(self, index: Sequence[int], times: Sequence[int], place: Place) -> Batch:
        """Return a batch of samples; its last transforms may still be pending.

        Args:
            index: of each sample.
            times: which time, or which view of it, each one is.
            place: what draws depend on besides.

        Raises:
            DataError: if a transform fails.
        """
        at, again = torch.tensor(index), torch.tensor(times)
        rows = at
        if self.views > 1:
            rows = (at[:, None] * self.views + torch.arange(self.views)).flatten()
        inputs = taken(self.inputs, self._placed(rows))
        numbers, first, pending = self._numbers(at, again, place), 0, None
        for number, step in enumerate(self.steps):
            if isinstance(step, OneByOne):
                inputs = self._one_by_one(step, inputs, index, times, number, place)
                continue
            last = first + step.draws
            drawn = None if numbers is None else numbers[:, first:last]
            pending, first = Pending(self.name, step.transforms, drawn), last
            if number < len(self.steps) - 1:
                inputs, pending = pending(inputs), None
        own = self._placed(at)
        targets, extras = taken(self.targets, own), taken(self.extras, own)
        return Batch(inputs, targets, at, extras, pending=pending)

    def fingerprints(
        self, batch: Batch, times: Sequence[int], place: Place, *, whole: bool
    ) -> list[int]:
        """Return of each sample a hash over its kept values and what is drawn for whole batches.

        Where samples have also been handled one by one, over what has become of them. With
        ``whole`` target and extras count too.

        Args:
            batch: as ``batch`` has given it.
            times: as it was given.
            place: as it was given.
            whole: whether target and extras count.
        """
        index = batch.index.tolist()
        numbers = self._numbers(batch.index, torch.tensor(times), place)
        drawn = [None] * len(index) if numbers is None else numbers.view(len(index), -1)
        seen: list[Any] = [None] * len(index)
        if any(isinstance(step, OneByOne) for step in self.steps):
            rows = torch.arange(len(index) * self.views).view(len(index), self.views)
            seen = [taken(batch.inputs, own) for own in rows]
        return [
            fingerprint((self._hash(sample, whole), row, inputs))
            for sample, row, inputs in zip(index, drawn, seen, strict=True)
        ]

    def _placed(self, index: torch.Tensor) -> torch.Tensor:
        """Return an index on the device, without waiting for what that has to do before."""
        if self.device.type != "cuda":
            return index.to(self.device)
        return index.pin_memory().to(self.device, non_blocking=True)

    def _hash(self, index: int, whole: bool) -> int:
        key = (index, whole)
        if key not in self.hashes:
            rows = torch.arange(index * self.views, (index + 1) * self.views).to(self.device)
            own = torch.tensor([index]).to(self.device)
            more = (taken(self.targets, own), taken(self.extras, own)) if whole else ()
            self.hashes[key] = fingerprint((taken(self.inputs, rows), *more))
        return self.hashes[key]

    def _numbers(
        self, index: torch.Tensor, times: torch.Tensor, place: Place
    ) -> torch.Tensor | None:
        """Return the draws of whole batches, a row for each input."""
        count = sum(step.draws for step in self.steps if isinstance(step, Whole))
        if count == 0:
            return None
        numbers = randomness.uniforms(place.base, index, times, count * self.views)
        return numbers.view(len(index) * self.views, count)

    def _one_by_one(
        self,
        step: OneByOne,
        inputs: Any,
        index: Sequence[int],
        times: Sequence[int],
        number: int,
        place: Place,
    ) -> Any:
        done = []
        for position, (sample, time) in enumerate(zip(index, times, strict=True)):
            place.seed(sample, time, number)
            for view in range(self.views):
                value = taken(inputs, position * self.views + view)
                if isinstance(value, torch.Tensor):
                    value = value.as_subclass(step.kind)
                done.append(self._transformed(step, value, sample))
        try:
            return default_collate(done)
        except (TypeError, RuntimeError, ValueError, LookupError) as error:
            raise DataError(
                f"data set '{self.name}': {step.names[-1]} gives what cannot be put into a batch: "
                + str(error).split("\n")[0]
            ) from error

    def _transformed(self, step: OneByOne, value: Any, sample: int) -> Any:
        with self._told(sample):
            for transform in step.transforms:
                value = transform(value)
        return value


def taken(value: Any, index: torch.Tensor | int) -> Any:
    """Return what of a batch's values belongs to the samples ``index``, or to a single one."""
    if isinstance(value, torch.Tensor):
        return value[index]
    if isinstance(value, Mapping):
        return {key: taken(item, index) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, (str, bytes)) for item in value):
            if isinstance(index, int):
                return value[index]
            return [value[number] for number in index.tolist()]
        parts = [taken(item, index) for item in value]
        return cast(Any, type(value))(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
