"""Samples of other classes, drawn for a whole batch at once, each as a function of its place.

No list of other classes' samples is kept: candidates are drawn from all, and those of the sample's
own class rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt, sqrt

import torch
from torch import Tensor

LARGEST = 2**63 - 1
DRAWN_AT_ONCE = 2**17
"""Numbers that are drawn together to be marked on a processor."""
NONE = -1
"""The class of what is no sample."""


@dataclass(frozen=True)
class Classes:
    """The samples of a data set by class.

    Attributes:
        order: the samples, those of a class side by side, int64 (N).
        of: the class of each sample, int32 (P), P the first prime from N on; ``NONE`` behind N.
        first: where a class begins in ``order``, int64 (C).
        members: how many samples it has, int64 (C).
        shuffled: the numbers below P, those below N in front and in a random order, int64.
    """

    order: Tensor
    of: Tensor
    first: Tensor
    members: Tensor
    shuffled: Tensor

    @classmethod
    def found(cls, labels: Tensor) -> Classes:
        """Return the classes of samples with these labels, int64 (N).

        One with a negative label is a class of its own.
        """
        size = len(labels)
        alone = labels < 0
        labels = torch.where(alone, labels.amax() + 1 + torch.arange(size), labels)
        _, of, members = labels.unique(return_inverse=True, return_counts=True)
        behind = torch.arange(size, prime_from(size))
        return cls(
            order=of.argsort(stable=True),
            of=torch.cat([of, torch.full_like(behind, NONE)]).int(),
            first=members.cumsum(0) - members,
            members=members,
            shuffled=torch.cat([torch.randperm(size, generator=_always_the_same()), behind]),
        )

    def __len__(self) -> int:
        return len(self.order)


def candidates(size: int, largest_class: int, count: int) -> int:
    """Return how many of all samples are drawn to find ``count`` of other classes among them.

    Enough but once in 10^9 times, by the spread of how many of one class are among them.
    """
    prime = prime_from(size)
    share = largest_class / size
    wanted = count / (1 - share) if share < 1 else prime
    spread = sqrt(wanted * share * (1 - share)) / max(1 - share, 1 / size)
    return min(prime, ceil(wanted + 6 * spread) + prime - size)


def draw(
    classes: Classes, samples: Tensor, drawn: int, count: int, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Return candidates for each sample, int64 (B, drawn), and which of them it keeps, bool.

    It keeps the first ``count`` that are of another class; a candidate that is no sample is none.
    No candidate comes twice. Each sample is one with the same probability, and each pair of samples
    with that of a draw without replacement: they stand at equal distances, around, in a shuffled
    row as long as a prime, where start and distance are drawn. (To reject some of them makes pairs
    of those that are left differ by about 1 / N.)

    Args:
        classes: of the data set.
        samples: int64 (B).
        drawn: how many candidates, at most ``len(classes.shuffled)``.
        count: how many to keep.
        key: int64 scalar; another one draws others.
    """
    found = _candidates(classes, scattered(samples + scattered(key)), drawn)
    of = classes.of.index_select(0, found.flatten()).view_as(found)
    kept = (of != classes.of[samples, None]).logical_and_(of != NONE)
    # Only behind the first of them can there be more than are to be kept.
    rest = kept[:, count:]
    rest &= rest.cumsum(1, dtype=torch.int32) <= count - kept[:, :count].sum(1, keepdim=True)
    return found, kept


def _candidates(classes: Classes, bits: Tensor, drawn: int) -> Tensor:
    """Return different numbers for each of some random ones, int64 (B, drawn)."""
    prime = len(classes.shuffled)
    distance = (bits & LARGEST) % (prime - 1) + 1
    start = (scattered(bits) & LARGEST) % prime
    places = torch.arange(drawn, device=bits.device) * distance[:, None]
    places.add_(start[:, None]).remainder_(prime)
    # Four times as fast on a processor as places for an index.
    return classes.shuffled.index_select(0, places.flatten()).view_as(places)


def mark(classes: Classes, samples: Tensor, drawn: int, count: int, key: Tensor) -> Tensor:
    """Return which samples are kept of those that ``draw`` gives for each of some, bool (N, B)."""
    batch = len(samples)
    marks = torch.zeros(len(classes.shuffled), batch, dtype=torch.bool, device=samples.device)
    columns = torch.arange(batch, device=samples.device)[:, None]
    # On a processor what is drawn for a few samples fits into its cache.
    few = max(1, DRAWN_AT_ONCE // drawn) if samples.device.type == "cpu" else batch
    for some, column in zip(samples.split(few), columns.split(few), strict=True):
        found, kept = draw(classes, some, drawn, count, key)
        marks.view(-1).put_(found.mul_(batch).add_(column), kept)
    return marks[: len(classes)]


def draw_shared(classes: Classes, drawn: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return one set of different samples, int64 (drawn), and their classes.

    Numbers behind the last sample are among them, whose class is ``NONE``.
    """
    found = _candidates(classes, scattered(key)[None], drawn)[0]
    return found, classes.of.index_select(0, found)


def draw_same(classes: Classes, samples: Tensor, key: Tensor) -> Tensor:
    """Return for each sample one of its class, perhaps itself, int64 (B)."""
    own = classes.of[samples].long()
    bits = scattered(samples + scattered(~key))  # not what the negatives are drawn from
    return classes.order[classes.first[own] + (bits & LARGEST) % classes.members[own]]


def scattered(numbers: Tensor) -> Tensor:
    """Return int64 numbers that look random, each a function of the one given.

    The finisher of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), in wrapping arithmetic.
    """
    numbers = numbers + _signed(0x9E3779B97F4A7C15)
    numbers = (numbers ^ _shifted(numbers, 30)) * _signed(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ _shifted(numbers, 27)) * _signed(0x94D049BB133111EB)
    return numbers ^ _shifted(numbers, 31)


def prime_from(size: int) -> int:
    """Return the first prime that is not below ``size``."""
    number = max(size, 2)
    while any(number % divisor == 0 for divisor in range(2, isqrt(number) + 1)):
        number += 1
    return number


def _always_the_same() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _shifted(numbers: Tensor, places: int) -> Tensor:
    return (numbers >> places) & ((1 << (64 - places)) - 1)  # no copies of the sign


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
