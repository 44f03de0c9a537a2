"""Parts of a data set: a random partition, and a choice of samples."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import Dataset

from distill import DataError, labels

ROUNDING = 1e-9
"""By how much fractions may exceed 1 in all."""


class _Part(Dataset[Any]):
    """Some samples of a data set.

    Attributes:
        dataset: the whole.
        indices: where its samples stand in the whole.
        classes: as the whole has them.
        targets: the labels of the samples; missing where the whole does not tell them unread.
    """

    targets: list[int]

    def __init__(self, dataset: Any, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = list(indices)
        self.classes = getattr(dataset, "classes", None)
        with suppress(DataError):
            of_all = labels(dataset, read=False)
            self.targets = [of_all[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    @property
    def __getitems__(self) -> Callable[[Sequence[int]], list[Any]]:
        """Reads several samples at once; missing where the whole cannot."""
        read: Callable[[Sequence[int]], list[Any]] = self.dataset.__getitems__
        return lambda indices: read([self.indices[index] for index in indices])


class RandomSplit(_Part):
    """One part of a random partition of a data set, in the order of the data set.

    Parts made with the same arguments but ``take`` have no sample in common, and hold all samples
    if their fractions add up to 1. What is drawn depends on ``seed``, on the number of samples and
    (where stratified) on their labels, and on nothing else.

    Args:
        dataset: what is parted.
        take: the name of the part.
        parts: name -> fraction of the samples, at most 1 in all; or, if all are whole numbers and
            one is above 1, name -> number of samples. Their order matters.
        seed: of the partition.
        stratified: whether every part has its share of every class; whole samples permitting, a
            class's number in a part is within about one of its share.

    Raises:
        ValueError: if ``take`` is none of the parts, a part is negative or empty, or the parts ask
            for more than there is.
        DataError: if ``stratified`` and the samples have no class labels.
    """

    def __init__(
        self,
        dataset: Any,
        take: str,
        parts: dict[str, float],
        seed: int = 0,
        stratified: bool = False,
    ):
        if take not in parts:
            raise ValueError(f"there is no part '{take}'; parts: {', '.join(parts) or 'none'}")
        ends = _ends(parts, len(dataset))
        position = list(parts).index(take)
        order = _order(len(dataset), seed, labels(dataset) if stratified else None)
        chosen = order[ends[position] : ends[position + 1]]
        super().__init__(dataset, sorted(chosen.tolist()))


class Subset(_Part):
    """Some samples of a data set, with their labels as they are.

    Says how many with one of ``fraction``, ``count``, ``per_class`` and ``indices``; or leaves that
    out and keeps every sample of ``classes``. With both, the number refers to the samples of
    ``classes``. What is drawn depends on the arguments, the number of samples and their labels
    alone; of two subsets that differ only in how many, the larger holds the smaller. The order is
    that of the data set, except with ``indices``.

    Args:
        dataset: what is chosen from.
        fraction: of the samples, above 0 and at most 1, rounded to whole samples.
        per_class: samples of each class that occurs; samples with a negative label have none.
        count: samples.
        indices: where the samples stand in the data set, in the order wanted.
        classes: labels, or names from the data set's ``classes``, to keep.
        seed: of the choice.
        stratified: for ``fraction`` and ``count``: whether every class keeps its share.

    Raises:
        ValueError: if the arguments do not go together or ask for what is not there.
        DataError: if labels are needed and the samples have none.
    """

    def __init__(
        self,
        dataset: Any,
        fraction: float | None = None,
        per_class: int | None = None,
        count: int | None = None,
        indices: list[int] | None = None,
        classes: list[int | str] | None = None,
        seed: int = 0,
        stratified: bool = False,
    ):
        given = {
            "fraction": fraction,
            "per_class": per_class,
            "count": count,
            "indices": indices,
        }
        _check_arguments(given, classes is not None, stratified)
        known = None
        if stratified or per_class is not None or classes is not None:
            known = labels(dataset)
        candidates = list(range(len(dataset)) if indices is None else _within(indices, dataset))
        if classes is not None and known is not None:
            wanted = _wanted_labels(dataset, classes, known)
            candidates = [index for index in candidates if known[index] in wanted]
        of_candidates = None if known is None else [known[index] for index in candidates]
        if per_class is not None and of_candidates is not None:
            drawn = _per_class(dataset, of_candidates, per_class, seed)
        elif fraction is not None or count is not None:
            size = _size(fraction, count, len(candidates))
            order = _order(len(candidates), seed, of_candidates if stratified else None)
            drawn = sorted(order[:size].tolist())
        else:
            drawn = list(range(len(candidates)))
        if not drawn:
            raise ValueError("no samples are left")
        super().__init__(dataset, [candidates[position] for position in drawn])


def _order(size: int, seed: int, classes: Sequence[int] | None) -> torch.Tensor:
    """Return a random order of ``size`` samples, int64 (size).

    With ``classes`` each class is spread evenly over it: its samples stand at even distances from
    a random start, so that any stretch of the order holds a class's share of it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    if classes is None:
        return order
    _, numbers, counts = torch.tensor(classes)[order].unique(
        return_inverse=True, return_counts=True
    )
    grouped = numbers.argsort(stable=True)
    order, numbers = order[grouped], numbers[grouped]
    rank = torch.arange(size) - (counts.cumsum(0) - counts)[numbers]
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    place = (rank + start[numbers]) / counts[numbers]
    return order[place.argsort(stable=True)]


def _ends(parts: Mapping[str, float], size: int) -> list[int]:
    """Return where the parts begin and end in an order of ``size`` samples."""
    for name, part in parts.items():
        if not part >= 0:
            raise ValueError(f"part '{name}' is {part}; a part cannot be negative")
    whole_numbers = all(isinstance(part, int) for part in parts.values())
    are_counts = whole_numbers and any(part > 1 for part in parts.values())
    total, available = math.fsum(parts.values()), size if are_counts else 1
    if total > available + ROUNDING:
        what = f"only {size} samples" if are_counts else "only the whole, which is 1"
        raise ValueError(f"the parts ask for {total:g} in all and there is {what}")
    scale = 1 if are_counts else size
    sums = [0.0, *itertools.accumulate(parts.values())]
    ends = [min(size, _rounded(end * scale)) for end in sums]
    for name, (start, end) in zip(parts, itertools.pairwise(ends), strict=True):
        if start == end:
            raise ValueError(f"part '{name}' is {parts[name]} of {size} samples: it is empty")
    return ends


def _rounded(value: float) -> int:
    """Round to the nearest whole number, halves up."""
    return math.floor(value + 0.5)


def _check_arguments(given: Mapping[str, Any], by_class: bool, stratified: bool) -> None:
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1 or not (named or by_class):
        said = " and ".join(named) or "none"
        raise ValueError(f"exactly one of {', '.join(given)} says how many, got {said}")
    if stratified and named not in (["fraction"], ["count"]):
        raise ValueError("stratified goes with fraction or count")


def _within(indices: Sequence[int], dataset: Any) -> Sequence[int]:
    wrong = [index for index in indices if not 0 <= index < len(dataset)]
    if wrong:
        raise ValueError(f"there is no sample {wrong[0]}; the data set has {len(dataset)}")
    return indices


def _size(fraction: float | None, count: int | None, available: int) -> int:
    if count is not None:
        if not 1 <= count <= available:
            raise ValueError(f"count is {count}: there are {available} samples")
        return count
    assert fraction is not None
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    return _rounded(fraction * available)


def _per_class(dataset: Any, known: Sequence[int], wanted: int, seed: int) -> list[int]:
    """Return positions in ``known`` with ``wanted`` of each class, ascending."""
    if wanted < 1:
        raise ValueError(f"per_class must be at least 1, got {wanted}")
    for label, available in sorted(Counter(known).items()):
        if label >= 0 and available < wanted:
            raise ValueError(
                f"class {_class_name(dataset, label)} has {available} samples, "
                f"fewer than per_class = {wanted}"
            )
    taken, chosen = Counter[int](), []
    for position in _order(len(known), seed, None).tolist():
        label = known[position]
        if label >= 0 and taken[label] < wanted:
            taken[label] += 1
            chosen.append(position)
    return sorted(chosen)


def _wanted_labels(dataset: Any, classes: Sequence[int | str], known: Sequence[int]) -> set[int]:
    names = _class_names(dataset)
    wanted = set()
    for given in classes:
        if isinstance(given, str) and given not in names:
            raise ValueError(f"there is no class '{given}'; classes: {', '.join(names) or 'none'}")
        wanted.add(names.index(given) if isinstance(given, str) else given)
    missing = wanted - set(known)
    if missing:
        raise ValueError(f"class {_class_name(dataset, min(missing))} has no samples")
    return wanted


def _class_names(dataset: Any) -> list[Any]:
    return list(getattr(dataset, "classes", None) or [])


def _class_name(dataset: Any, label: int) -> str:
    names = _class_names(dataset)
    return f"'{names[label]}'" if 0 <= label < len(names) else str(label)
