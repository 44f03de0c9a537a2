"""Samples of other classes, drawn for a whole batch at once, each as a function of its place.

No list of other classes' samples is kept: those of a class stand side by side in one order of all
samples, so the others are the places before and behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEWEST_PRIMES = 2**16
"""Numbers up to at least here are looked through for primes."""
LARGEST = 2**63 - 1
DRAWN_AT_ONCE = 2**17
"""Numbers that are drawn together to be marked on a processor."""


@dataclass(frozen=True)
class Classes:
    """The samples of a data set by class.

    Attributes:
        order: the samples, those of a class side by side, twice over, int64 (2 N): so the others of
            a class follow it in one piece.
        of: the class of each sample, int64 (N).
        first: where a class begins in ``order``, int64 (C).
        members: how many samples it has, int64 (C).
        strides: primes above N, int64.
    """

    order: Tensor
    of: Tensor
    first: Tensor
    members: Tensor
    strides: Tensor

    @classmethod
    def found(cls, labels: Tensor) -> Classes:
        """Return the classes of samples with these labels, int64 (N).

        One with a negative label is a class of its own.
        """
        alone = labels < 0
        labels = torch.where(alone, labels.amax() + 1 + torch.arange(len(labels)), labels)
        _, of, members = labels.unique(return_inverse=True, return_counts=True)
        first = members.cumsum(0) - members
        order = of.argsort(stable=True).repeat(2)
        return cls(order, of, first, members, primes_above(len(labels)))

    def __len__(self) -> int:
        return len(self.of)

    def others(self, samples: Tensor) -> Tensor:
        """Return how many samples are of another class than each of some, int64 (B)."""
        return len(self) - self.members[self.of[samples]]


def draw(classes: Classes, samples: Tensor, count: int, key: Tensor) -> Tensor:
    """Return samples of other classes for each of some, int64 (B, count).

    None comes twice, unless there are fewer than ``count``: then all of them come, again and again.
    Each of them comes with the same probability, and so does each pair of them, nearly: they stand
    in equal distances, taken around, in the order of the other classes' samples, beginning
    anywhere; the distance is drawn too, from those that meet every sample.

    Args:
        classes: of the data set.
        samples: int64 (B), none of them the only class there is.
        count: how many for each.
        key: int64 scalar; another one draws others.
    """
    own = classes.of[samples]
    behind, others = classes.first[own] + classes.members[own], classes.others(samples)
    bits = scattered(samples + scattered(key))
    stride = classes.strides[(bits & LARGEST) % len(classes.strides)] % others
    start = (scattered(bits) & LARGEST) % others
    places = torch.arange(count, device=samples.device) * stride[:, None]
    places.add_(start[:, None]).remainder_(others[:, None])
    places.add_(behind[:, None])
    # Four times as fast on a processor as places for an index.
    return classes.order.index_select(0, places.flatten()).view_as(places)


def mark(classes: Classes, samples: Tensor, count: int, key: Tensor) -> Tensor:
    """Return which samples ``draw`` gives for each of some, bool (N, B)."""
    size, batch = len(classes), len(samples)
    marks = torch.zeros(size, batch, dtype=torch.bool, device=samples.device)
    columns = torch.arange(batch, device=samples.device)[:, None]
    yes = torch.ones((), dtype=torch.bool, device=samples.device)
    # On a processor what is drawn for a few samples fits into its cache.
    few = max(1, DRAWN_AT_ONCE // count) if samples.device.type == "cpu" else batch
    for some, column in zip(samples.split(few), columns.split(few), strict=True):
        places = draw(classes, some, count, key).mul_(batch).add_(column)
        marks.view(-1).put_(places, yes.expand_as(places))
    return marks


def draw_shared(classes: Classes, count: int, key: Tensor) -> Tensor:
    """Return different samples of any class, int64 (count), or all if there are fewer."""
    size = len(classes)
    bits = scattered(key)
    stride = classes.strides[(bits & LARGEST) % len(classes.strides)]
    places = torch.arange(min(count, size), device=key.device) * stride
    return (places + ((scattered(bits) & LARGEST) % size)) % size


def draw_same(classes: Classes, samples: Tensor, key: Tensor) -> Tensor:
    """Return for each sample one of its class, perhaps itself, int64 (B)."""
    own = classes.of[samples]
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


def primes_above(size: int) -> Tensor:
    """Return primes above ``size``, up to some multiple of it, ascending, int64."""
    end = max(4 * size, FEWEST_PRIMES)
    is_prime = np.ones(end, dtype=bool)
    is_prime[:2] = False
    for number in range(2, int(end**0.5) + 1):
        if is_prime[number]:
            is_prime[number * number :: number] = False
    is_prime[: size + 1] = False
    return torch.from_numpy(np.flatnonzero(is_prime)).long()


def _shifted(numbers: Tensor, places: int) -> Tensor:
    return (numbers >> places) & ((1 << (64 - places)) - 1)  # no copies of the sign


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
