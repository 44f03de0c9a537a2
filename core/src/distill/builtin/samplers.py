"""Which samples an epoch draws, and in which batches.

All draw from torch's global generator while they are iterated and keep nothing in between: an epoch
is a function of the generator's state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import data

from distill import labels


class SequentialSampler(data.SequentialSampler):
    """Every sample once, in the order of the data set."""

    def __init__(self, dataset: Any):
        super().__init__(dataset)


class RandomSampler(data.RandomSampler):
    """Samples at random.

    Args:
        dataset: what is drawn from.
        replacement: whether a sample may come again before all others have come.
        num_samples: how many an epoch draws; as many as the data set has if ``None``. Without
            replacement, more than that is one permutation after the other.

    Raises:
        ValueError: if ``num_samples`` is below 1.
    """

    def __init__(self, dataset: Any, replacement: bool = False, num_samples: int | None = None):
        super().__init__(dataset, replacement, num_samples)


class RepeatedAugmentationSampler(data.Sampler[int]):
    """Several augmentations of a sample in a batch, in epochs of the usual length.

    A permutation of the data set with every index ``repeats`` times in a row, cut to ``length``.
    The copies, each transformed anew, mostly share a batch, and an epoch sees about one of
    ``repeats`` samples of the data set.

    Args:
        dataset: what is drawn from.
        repeats: how often a sample comes.
        length: samples an epoch; as many as the data set has if ``None``.

    Raises:
        ValueError: if ``repeats`` or ``length`` is below 1, or ``length`` is above ``repeats``
            times the data set's.

    Source: Hoffer et al., Augment Your Batch, CVPR 2020; Berman et al., MultiGrain, 2019. Training
    of DeiT (Touvron et al., 2021) gives the copies to different processes and rounds the length
    down to a multiple of 256; here both are left to the batches.
    """

    def __init__(self, dataset: Any, repeats: int = 3, length: int | None = None):
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        self._size, self._repeats = len(dataset), repeats
        self._length = self._size if length is None else length
        if not 1 <= self._length <= self._size * repeats:
            raise ValueError(
                f"length must be from 1 to {self._size * repeats}, {repeats} times the data "
                f"set's, got {self._length}"
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._size).repeat_interleave(self._repeats)
        return iter(order[: self._length].tolist())


class ClassBalancedSampler(data.Sampler[int]):
    """Every draw is of any class with equal probability, and of any of its samples.

    The same as drawing with replacement with weights inverse to the frequency of a sample's class.
    Samples with a negative label belong to no class and are not drawn.

    Args:
        dataset: what is drawn from.
        num_samples: how many an epoch draws; as many as the data set has if ``None``.

    Raises:
        ValueError: if ``num_samples`` is below 1, or no sample has a class.
        DataError: if the targets are no class labels.
    """

    def __init__(self, dataset: Any, num_samples: int | None = None):
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self._samples = len(dataset) if num_samples is None else num_samples
        members = _members(labels(dataset))
        self._members = torch.tensor([index for group in members for index in group])
        self._counts = torch.tensor([len(group) for group in members])

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randint(len(self._counts), (self._samples,))
        counts = self._counts[drawn]
        within = (torch.rand(self._samples, dtype=torch.float64) * counts).long()
        first = (self._counts.cumsum(0) - self._counts)[drawn]
        return iter(self._members[first + within].tolist())


class ClassesPerBatchSampler(data.Sampler[list[int]]):
    """Batches of a few classes with several samples each, for losses on relations of samples.

    A batch draws ``batch_size / samples_per_class`` different classes, each set of classes with
    equal probability, and lists ``samples_per_class`` samples of the first, of the second, and so
    on. A class hands its samples out in a random order, and in a new one as soon as fewer than
    ``samples_per_class`` are left: no sample comes twice in a batch. A class with fewer samples
    than that gives all of them, again and again in new orders, until it has given enough. Samples
    with a negative label belong to no class and are not drawn.

    An epoch has as many whole batches as the samples with a class would fill, and at least one.

    Args:
        dataset: what is drawn from.
        batch_size: samples a batch, over all processes.
        samples_per_class: samples of one class in a batch.

    Raises:
        ValueError: if ``batch_size`` is no multiple of ``samples_per_class``, or there are not
            enough classes.
        DataError: if the targets are no class labels.

    Source: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017,
    section 2, where batches of P classes with K samples each are proposed.
    """

    def __init__(self, dataset: Any, batch_size: int, samples_per_class: int):
        if samples_per_class < 1 or batch_size < 1 or batch_size % samples_per_class:
            raise ValueError(
                f"batch_size ({batch_size}) must be a multiple of samples_per_class "
                f"({samples_per_class})"
            )
        self._members = _members(labels(dataset))
        self._per_class = samples_per_class
        self._classes = batch_size // samples_per_class
        if len(self._members) < self._classes:
            raise ValueError(
                f"a batch of {batch_size} with {samples_per_class} samples a class needs "
                f"{self._classes} classes; the data set has {len(self._members)}"
            )
        self._batches = max(1, sum(map(len, self._members)) // batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        handing_out = [_groups(members, self._per_class) for members in self._members]
        for _ in range(self._batches):
            classes = torch.randperm(len(self._members))[: self._classes].tolist()
            yield [index for number in classes for index in next(handing_out[number])]


def _members(known: Sequence[int]) -> list[list[int]]:
    """Return the samples of each class, classes in the order of their labels."""
    members: dict[int, list[int]] = {label: [] for label in sorted(set(known)) if label >= 0}
    if not members:
        raise ValueError("no sample has a class")
    for index, label in enumerate(known):
        if label >= 0:
            members[label].append(index)
    return list(members.values())


def _groups(members: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield groups of ``size`` samples of a class without end."""
    rounds = -(-size // len(members))
    while True:
        orders = [torch.randperm(len(members)).tolist() for _ in range(rounds)]
        order = [members[place] for place in itertools.chain(*orders)]
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]
