"""Samples of other classes, drawn for a whole batch at once, each as a function of its place.

No list of other classes' samples is kept: each sample ranks all samples, and takes the first ones
that are not of its own class.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, isqrt, sqrt

import torch
from torch import Tensor, nn

LARGEST = 2**63 - 1
OWN_AT_ONCE = 2**20
"""How many members of the batch's own classes are ranked together."""
MARKED_AT_ONCE = {"cpu": 2**17, "cuda": 2**24}
"""How many samples are marked together, times those that they are marked for, by device type."""
NONE = -1
"""The class of what is no sample."""


class Classes(nn.Module):
    """The samples of a data set by class, and draws of those of other classes.

    Each sample ranks all others at random: they stand around in a shuffled row as long as a prime
    P, and are met from a start on at equal distances, where start and distance are drawn. Its
    negatives are the first ``count`` of other classes. So none comes twice, each is a negative with
    the same probability, and each pair with that of a draw without replacement. (To reject some of
    them makes those that are left differ: single ones by a percent or two of their probability and
    pairs by a fifth with 8 of 60, by 0.1 % and 2 % with 60 of 307.)

    Args:
        labels: of the samples, int64 (N); one with a negative label is a class of its own.
        count: how many negatives a sample has, if there are so many.

    Attributes:
        order: the samples, those of a class side by side, int32 (N).
        of: the class of each number, int32 (P), P the first prime from N on; ``NONE`` from N on.
        first: where a class begins in ``order``, int64 (C).
        members: how many samples it has, int64 (C).
        shuffled: the numbers below P as they stand in the row, those below N in front, int32.
        place: where each number stands in it, int32 (P).
        count: as given.
        drawn: how many of the first ranks have ``count`` of other classes among them: all of them,
            or enough but once in 10^9 times, by the spread of how many of one class are there.
    """

    order: Tensor
    of: Tensor
    first: Tensor
    members: Tensor
    shuffled: Tensor
    place: Tensor

    def __init__(self, labels: Tensor, count: int) -> None:
        super().__init__()
        size, prime = len(labels), prime_from(len(labels))
        order, members = _by_class(labels)
        of = torch.full((prime,), NONE, dtype=torch.int32)
        of[order] = torch.arange(len(members), dtype=torch.int32).repeat_interleave(members)
        row = torch.arange(prime, dtype=torch.int32)
        torch.randperm(size, generator=_always_the_same(), out=row[:size])
        place = torch.empty_like(row)
        place[row] = torch.arange(prime, dtype=torch.int32)
        found = {
            "order": order,
            "of": of,
            "first": members.cumsum(0) - members,
            "members": members,
            "shuffled": row,
            "place": place,
        }
        for name, value in found.items():
            self.register_buffer(name, value, persistent=False)
        self.count = count
        self._largest = int(members.max())
        self.drawn = enough(size, self._largest, count)

    def __len__(self) -> int:
        return len(self.order)

    def listed(self, samples: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers for each sample, which of them are its negatives, and how many are.

        Numbers are int32 (B, drawn), those from N on are never negatives; then bool (B, drawn) and
        int64 (B).

        Args:
            samples: int64 (B).
            key: int64 scalar; another one draws others.
        """
        start, distance = self._path(samples, key)
        ranks = torch.arange(self.drawn, device=samples.device)
        numbers = self.met(start, distance, ranks)
        of = self.of.index_select(0, numbers.flatten()).view_as(numbers)
        end, count = self._end(samples, start, distance)
        kept = (of != self.of[samples, None]).logical_and_(of != NONE)
        return numbers, kept.logical_and_(ranks < end[:, None]), count

    def marked(self, samples: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return which samples are negatives of each of some, bool (N, B), and how many, (B).

        They are those of ``listed``, found by the rank of each: what the place times 1 / distance
        is beyond whole turns around the row.
        """
        start, distance = self._path(samples, key)
        end, count = self._end(samples, start, distance)
        prime = len(self.place)
        backwards = inverse(distance, prime)
        step = backwards.double() / prime
        # Half a rank from where a turn ends, as float64 is not exact.
        begin = ((-start * backwards).remainder(prime) + 0.5) / prime
        part = end / prime
        marks = torch.empty(len(self), len(samples), dtype=torch.bool, device=samples.device)
        size = max(1, MARKED_AT_ONCE.get(samples.device.type, 2**17) // len(samples))
        space = torch.empty(size, len(samples), dtype=torch.float64, device=samples.device)
        for some, places in zip(
            marks.split(size), self.place[: len(self)].split(size), strict=True
        ):
            turns = torch.mul(places[:, None], step, out=space[: len(some)])
            torch.lt(turns.add_(begin).frac_(), part, out=some)
        columns = torch.arange(len(samples), device=samples.device)[:, None]
        for chosen, column in self.in_parts(samples, columns):
            own, _ = self._all_of(self.of[chosen].long())
            marks.view(-1).index_fill_(0, (own * len(samples) + column).flatten(), False)
        return marks, count

    def shared(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return one set of different numbers with ``count`` samples, int32, and their classes.

        Those from N on are no samples, and of the class ``NONE``; they do not count.
        """
        drawn = min(self.count, len(self)) + len(self.of) - len(self)
        start, distance = self._path_of(scattered(key)[None])
        found = self.met(start, distance, torch.arange(drawn, device=key.device))[0]
        return found, self.of.index_select(0, found)

    def same(self, samples: Tensor, key: Tensor) -> Tensor:
        """Return for each sample one of its class, perhaps itself, int64 (B)."""
        own = self.of[samples].long()
        bits = scattered(samples + scattered(~key))  # not what the negatives are drawn from
        return self.order[self.first[own] + (bits & LARGEST) % self.members[own]].long()

    def _path(self, samples: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._path_of(scattered(samples + scattered(key)))

    def _path_of(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        return path(bits, len(self.shuffled))

    def met(self, start: Tensor, distance: Tensor, ranks: Tensor) -> Tensor:
        """Return the numbers at some ranks, which may be others for each, int32 (B, ranks)."""
        places = ranks * distance[:, None]
        places.add_(start[:, None]).remainder_(len(self.shuffled))
        # Four times as fast on a processor as places for an index.
        return self.shuffled.index_select(0, places.flatten()).view_as(places)

    def _end(self, samples: Tensor, start: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rank that each sample's negatives end before, and how many they are, (B)."""
        if self.drawn <= self.count:  # all of other classes
            none = len(self.of) - len(self)
            own = self.members[self.of[samples].long()]
            return torch.full_like(own, self.drawn), self.drawn - none - own
        parts = self.in_parts(samples, start, inverse(distance, len(self.place)))
        ends, counts = zip(*(self._end_of_few(*part) for part in parts), strict=True)
        return torch.cat(ends), torch.cat(counts)

    def _end_of_few(
        self, samples: Tensor, start: Tensor, backwards: Tensor
    ) -> tuple[Tensor, Tensor]:
        numbers, is_one = self.excluded(self.of[samples].long())
        ranks = (self.place[numbers] - start[:, None]).mul_(backwards[:, None])
        ranks = torch.where(is_one, ranks.remainder_(len(self.place)), self.drawn)
        wanted = (ranks < self.count).sum(1)
        # Of the ranks behind the first ``count``, those that are not taken, one by one.
        rest = ranks.new_ones(len(ranks), self.drawn - self.count + 1)
        taken = (ranks - (self.count - 1)).clamp_min_(0).mul_(ranks < self.drawn)
        rest.scatter_(1, taken, 0)  # all that are elsewhere at 0
        rest[:, 0] = 0
        before = rest.cumsum(1) - rest
        end = self.count - 1 + (before < wanted[:, None]).sum(1)
        missing = (wanted - rest.sum(1)).clamp_min_(0)
        return torch.where(wanted > 0, end, self.count), self.count - missing

    def excluded(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is no negative of some classes: numbers, and which are no repetitions.

        Int64 and bool (B, M): the samples of each class (B), and numbers that are no samples.
        """
        numbers, is_one = self._all_of(classes)
        behind = torch.arange(len(self), len(self.of), device=classes.device)
        numbers = torch.cat([numbers, behind.expand(len(numbers), -1)], 1)
        return numbers, torch.cat([is_one, is_one.new_ones(len(is_one), len(behind))], 1)

    def _all_of(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return all of some classes, int64 (B, M), and which of them are no repetitions."""
        members = self.members[classes, None]
        each = torch.arange(self._largest, device=classes.device)
        found = self.order[self.first[classes, None] + torch.minimum(each, members - 1)]
        return found.long(), each < members

    def in_parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield parts of values (B), of so many of these as the largest class allows."""
        size = max(1, OWN_AT_ONCE // self._largest)
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _by_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples, those of a class side by side, int32 (N), and how many are in each, (C).

    NumPy sorts numbers of 16 bits by counting, ten times as fast as wider ones, and in less memory
    than torch, which would be most of what the set-up takes beside the banks.
    """
    alone = labels < 0
    if alone.any():
        labels = labels.clone()
        labels[alone] = labels.amax() + 1 + torch.arange(int(alone.sum()))
    narrow = labels.short() if int(labels.amax()) < 2**15 else labels
    order = torch.from_numpy(narrow.numpy().argsort(kind="stable"))
    of = labels[order]
    first = torch.cat([torch.ones(1, dtype=torch.bool), of[1:] != of[:-1]]).nonzero().flatten()
    return order.int(), torch.cat([first, torch.tensor([len(of)])]).diff()


def enough(size: int, largest_class: int, count: int) -> int:
    """Return how many of all are drawn to find ``count`` of other classes among them.

    Enough but once in 10^9 times, by the spread of how many of one class are among them.
    """
    prime = prime_from(size)
    share = largest_class / size
    wanted = count / (1 - share) if share < 1 else prime
    spread = sqrt(wanted * share * (1 - share)) / max(1 - share, 1 / size)
    return min(prime, ceil(wanted + 6 * spread) + prime - size)


def path(bits: Tensor, prime: int) -> tuple[Tensor, Tensor]:
    """Return from random numbers a start below a prime and a distance above 0, int64 as given."""
    return (scattered(bits) & LARGEST) % prime, (bits & LARGEST) % (prime - 1) + 1


def inverse(numbers: Tensor, prime: int) -> Tensor:
    """Return what gives 1 times numbers, modulo a prime: their power of prime - 2 (Fermat)."""
    power, rest = torch.ones_like(numbers), prime - 2
    while rest:
        if rest % 2:
            power = power * numbers % prime
        numbers, rest = numbers * numbers % prime, rest // 2
    return power


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
