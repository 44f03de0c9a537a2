"""Which samples come in which batch and step, the same on every process."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from distill import distributed, randomness
from distill.errors import DataError

T = TypeVar("T")
Key = tuple[int, int]
"""A sample in an epoch: its index, and which of its views; of samples without fixed views, how
often it has come before in this epoch."""


@dataclass(frozen=True)
class Part:
    """One process's part of a global batch.

    Attributes:
        keys: what to read.
        share: weight of its mean loss, see ``Batch``.
        lead: so many keys in front belong to other processes; see ``distill.data.mixing``.
        ends_step: whether the weights are updated after it.
        sizes: how many samples of the batch each process has.
    """

    keys: list[Key]
    share: float
    lead: int
    ends_step: bool
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The batches of an epoch.

    Attributes:
        size: samples in the data set.
        batch_size: samples a batch, over all processes.
        drop_last: whether to leave out an incomplete last batch.
        accumulate: batches a step; the last step of an epoch may have fewer.
        sampler: gives the samples of an epoch; ``None`` for a new permutation every epoch.
        batch_sampler: gives the batches of an epoch, in place of the above.
        views: so many views of each sample; an epoch takes the one after the epoch before. ``None``
            for new ones every epoch.
        views_at_once: so many of them follow one another. An epoch then has that many times fewer
            samples, each in as many views; together with as many epochs it has all of them.
        period: epochs after which the order comes again, ``None`` for never.
    """

    size: int
    batch_size: int
    drop_last: bool = False
    accumulate: int = 1
    sampler: Any = None
    batch_sampler: Any = None
    views: int | None = None
    views_at_once: int = 1
    period: int | None = None

    @property
    def samples(self) -> int:
        """Samples an epoch draws; with a batch sampler as many as its batches should have."""
        if self.batch_sampler is not None:
            return len(self.batch_sampler) * self.batch_size
        return self.size if self.sampler is None else len(cast(Sized, self.sampler))

    @property
    def batches(self) -> int:
        """Batches an epoch."""
        if self.batch_sampler is not None:
            return len(self.batch_sampler)
        full, rest = divmod(self.samples, self.batch_size)
        return full + bool(rest and not self.drop_last)

    @property
    def steps(self) -> int:
        """Updates of the weights an epoch."""
        return -(-self.batches // self.accumulate)

    def draw(self, seed: int, epoch: int) -> list[list[int]]:
        """Return the samples of each global batch of an epoch.

        Raises:
            DataError: if a sampler gives no such samples, or not as many as its length says.
        """
        epoch = epoch % self.period if self.period else epoch
        with randomness.seeded(seed, "order", epoch):
            if self.batch_sampler is not None:
                drawn = self._indices(self.batch_sampler, lambda batch: [int(i) for i in batch])
                self._check(drawn, [i for batch in drawn for i in batch], len(self.batch_sampler))
                return drawn
            order = self._order(seed, epoch)
        batches = [order[s : s + self.batch_size] for s in range(0, len(order), self.batch_size)]
        return batches[: self.batches]

    def parts(self, seed: int, epoch: int, lead: int = 0) -> Iterator[Part]:
        """Yield this process's part of each batch of an epoch.

        Args:
            seed: of the run.
            epoch: of the stage, from 0.
            lead: samples of the neighbouring part that each part needs in front.
        """
        batches = self._keys(self.draw(seed, epoch), epoch)
        world, rank = distributed.world_size(), distributed.rank()
        for first in range(0, len(batches), self.accumulate):
            step = batches[first : first + self.accumulate]
            samples = sum(map(len, step))
            for number, keys in enumerate(step):
                bounds = [len(keys) * r // world for r in range(world + 1)]
                sizes = tuple(end - start for start, end in itertools.pairwise(bounds))
                start, end = bounds[rank], bounds[rank + 1]
                share = (end - start) * world / samples
                end = max(end, start + 1)  # with nothing left, a sample that does not count
                before = lead if world > 1 else 0
                own = [keys[i % len(keys)] for i in range(start - before, end)]
                yield Part(own, share, before, number == len(step) - 1, sizes)

    def _keys(self, batches: Sequence[Sequence[int]], epoch: int) -> list[list[Key]]:
        if self.views is None:
            return _counted(batches)
        if self.views_at_once == 1:
            counted = _counted(batches)
            return [[(i, (epoch + n) % self.views) for i, n in batch] for batch in counted]
        turn, part = divmod(epoch, self.views_at_once)
        places = itertools.count(part * self.size)
        first = turn * self.views_at_once
        return [
            [(i, (first + next(places) % self.views_at_once) % self.views) for i in batch]
            for batch in batches
        ]

    def _order(self, seed: int, epoch: int) -> list[int]:
        if self.sampler is None:
            turn, part = divmod(epoch, self.views_at_once)
            generator = torch.Generator().manual_seed(randomness.derive(seed, "order", turn))
            drawn = torch.randperm(self.size, generator=generator)
            if self.views_at_once > 1:
                places = torch.arange(part * self.size, (part + 1) * self.size)
                drawn = drawn[places // self.views_at_once]
            return drawn.tolist()
        order = self._indices(self.sampler, int)
        self._check(order, order, len(self.sampler))
        return order

    @staticmethod
    def _indices(sampler: Any, read: Callable[[Any], T]) -> list[T]:
        try:
            return [read(item) for item in sampler]
        except TypeError as error:
            kind = type(sampler).__name__
            raise DataError(
                f"{kind} gave something else than it should ({error}): a sampler gives whole "
                "numbers, a batch sampler lists of them"
            ) from error

    def _check(self, drawn: Sequence[Any], indices: Sequence[int], promised: int) -> None:
        kind = type(self.sampler or self.batch_sampler).__name__
        if len(drawn) != promised:
            raise DataError(
                f"{kind} says that it has {promised} items and gave {len(drawn)}; processes and "
                "schedules count on its length"
            )
        wrong = [index for index in indices if not 0 <= index < self.size]
        if wrong or not all(batch != [] for batch in drawn):
            what = f"sample {wrong[0]} of a data set of {self.size}" if wrong else "an empty batch"
            raise DataError(f"{kind} gave {what}")


def _counted(batches: Sequence[Sequence[int]]) -> list[list[Key]]:
    """Give each index how often it has come before in this epoch."""
    seen = Counter[int]()
    keys: list[list[Key]] = []
    for batch in batches:
        keys.append([])
        for index in batch:
            keys[-1].append((index, seen[index]))
            seen[index] += 1
    return keys
