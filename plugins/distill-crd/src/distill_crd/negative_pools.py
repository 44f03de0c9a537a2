"""Negatives from a part of what is of other classes, chosen once for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_crd.negatives import NONE, Classes, enough, inverse, path, prime_from, scattered

POOLS_OF = 0x706F6F6C
"""What pools are drawn from, besides the class."""


class Pools(nn.Module):
    """For each class a pool of samples of others, and draws from it.

    No pool is listed: a class ranks all samples at random, as ``Classes`` has it, and its pool are
    those of other classes up to a certain rank. A sample ranks these ranks in the same way, and
    takes the first ``classes.count``. So what holds there holds here within a pool, and pools are
    the same in every run on the same data.

    Args:
        classes: the samples by class.
        ratio: how large a part of those of other classes a pool is, rounded down but one at least.

    Attributes:
        sizes: of the pools, int64 (C).
        ends: the rank that each class's pool ends before, int64 (C).
        drawn: how many of the first ranks have ``count`` of a pool among them, but once in 10^9
            times.
    """

    sizes: Tensor
    ends: Tensor

    def __init__(self, classes: Classes, ratio: float) -> None:
        super().__init__()
        self.classes = classes
        others = len(classes) - classes.members
        sizes = (others * ratio).long().clamp_min(1).minimum(others)
        numbers = torch.arange(len(sizes))
        parts = [_ends(classes, *part) for part in classes.in_parts(numbers, sizes)]
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("ends", torch.cat(parts), persistent=False)
        self._prime = prime_from(int(self.ends.max()))
        self.drawn = enough(self._prime, self._prime - int(sizes.min()), classes.count)

    def listed(self, samples: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers, which of them are negatives, and how many, as ``Classes.listed`` does."""
        classes = self.classes
        own = classes.of[samples].long()
        start, distance = path(scattered(samples + scattered(key)), self._prime)
        ranks = torch.arange(self.drawn, device=samples.device) * distance[:, None]
        ranks.add_(start[:, None]).remainder_(self._prime)
        numbers = classes.met(*_path_of(classes, own), ranks)
        of = classes.of.index_select(0, numbers.flatten()).view_as(numbers)
        kept = (of != own[:, None]).logical_and_(of != NONE)
        kept.logical_and_(ranks < self.ends[own, None])
        kept.logical_and_(kept.cumsum(1, dtype=torch.int32) <= classes.count)
        return numbers, kept, self.sizes[own].clamp_max(classes.count)


def _path_of(classes: Classes, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return start and distance of the ranks of some classes, int64 (C)."""
    return path(scattered(numbers + scattered(numbers.new_tensor(POOLS_OF))), len(classes.of))


def _ends(classes: Classes, numbers: Tensor, sizes: Tensor) -> Tensor:
    """Return the rank that so many of other classes are before, for some classes, int64 (C)."""
    prime = len(classes.of)
    start, distance = _path_of(classes, numbers)
    excluded, is_one = classes.excluded(numbers)
    ranks = (classes.place[excluded] - start[:, None]).mul_(inverse(distance, prime)[:, None])
    ranks = torch.where(is_one, ranks.remainder_(prime), 2 * prime).sort(1).values
    # Each has so many of other classes before it as its rank is more than its place among these.
    others_before = ranks - torch.arange(ranks.shape[1], device=ranks.device)
    return sizes + (others_before < sizes[:, None]).sum(1)
