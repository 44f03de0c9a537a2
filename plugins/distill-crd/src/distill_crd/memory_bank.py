"""Rows of a bank: random ones to begin with, and those that follow their samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FILLED_AT_ONCE = 2**14
"""Rows that are drawn together, in memory of their own."""


def random_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a bank of rows of length about 1, (rows, width), uniform in each element."""
    bound = (width / 3) ** -0.5
    bank = torch.empty(rows, width, dtype=dtype, device=device)
    for part in bank.split(FILLED_AT_ONCE):
        # In float32, which is drawn faster than it could be in less.
        part.copy_(torch.empty(part.shape, device=device).uniform_(-bound, bound))
    return bank


def momentum_rows(bank: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """Return rows moved towards embeddings (n, D), of length 1."""
    moved = bank[index].to(embeddings.dtype) * momentum + embeddings * (1 - momentum)
    return F.normalize(moved, dim=1)


def last_of_each(index: Tensor, size: int) -> Tensor:
    """Return for each place of ``index`` (n), numbers below ``size``, the last place of the same.

    So that a sample that comes twice in a batch leaves the same in its row on every device.
    """
    places = torch.arange(len(index), device=index.device)
    last = index.new_zeros(size).scatter_reduce_(0, index, places, "amax")
    return last[index]


def push(queue: Tensor, pushed: Tensor, newest: Tensor) -> None:
    """Put rows into a queue (Q, ...) in place of the oldest.

    Args:
        queue: a ring.
        pushed: how many rows it has been given so far, int64 scalar.
        newest: (n, ...), of which the last Q stay.
    """
    places = pushed + torch.arange(len(newest), device=queue.device)
    queue[places[-len(queue) :] % len(queue)] = newest[-len(queue) :].to(queue.dtype)
