"""Rows of a bank: random ones to begin with, and those that follow their samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

FILLED_AT_ONCE = 2**14
"""Rows that are drawn together, in memory of their own."""
FILLED_AT_ONCE_ON_CPU = 2**11
"""Fewer there, which stay in a core's cache."""
DRAWN_APART = 2**17
"""Rows whose numbers a generator of their own draws, on a processor, so that all cores may draw."""


def random_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a bank of rows of length about 1, (rows, width), uniform in each element."""
    bound = (width / 3) ** -0.5
    if device.type != "cpu":
        bank = torch.empty(rows, width, dtype=dtype, device=device)
        for part in bank.split(FILLED_AT_ONCE):
            # In float32, which is drawn faster than it could be in less.
            part.copy_(torch.empty(part.shape, device=device).uniform_(-bound, bound))
        return bank
    bank = torch.empty(rows, width, dtype=dtype)
    parts = bank.split(DRAWN_APART)
    seeds = torch.randint(2**62, (len(parts),), device="cpu").tolist()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(lambda part, seed: _fill(part, seed, bound), parts, seeds))
    return bank


def _fill(bank: Tensor, seed: int, bound: float) -> None:
    """Draw each element between -bound and bound, by a faster generator than torch has on a CPU.

    It takes one of 2**16 values, so that four are drawn at once.
    """
    generator = numpy.random.Generator(numpy.random.SFC64(seed))
    for part in bank.split(FILLED_AT_ONCE_ON_CPU):
        drawn = generator.integers(-(2**63), 2**63, -(-part.numel() // 4), dtype=numpy.int64)
        values = torch.from_numpy(drawn.view(numpy.int16))[: part.numel()]
        part.copy_(values.view(part.shape)).mul_(bound / 2**15)


def momentum_rows(bank: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """Return rows moved towards embeddings (n, D), of length 1."""
    moved = bank[index].to(embeddings.dtype) * momentum + embeddings * (1 - momentum)
    return F.normalize(moved, dim=1)


def last_of_each(index: Tensor) -> Tensor:
    """Return for each place of ``index`` (n) the last place of the same number.

    So that a sample that comes twice in a batch leaves the same in its row on every device.
    """
    numbers, places = index.sort(stable=True)
    return places[torch.searchsorted(numbers, index, right=True) - 1]


def push(queue: Tensor, pushed: Tensor, newest: Tensor) -> None:
    """Put rows into a queue (Q, ...) in place of the oldest.

    Args:
        queue: a ring.
        pushed: how many rows it has been given so far, int64 scalar.
        newest: (n, ...), of which the last Q stay.
    """
    places = pushed + torch.arange(len(newest), device=queue.device)
    queue[places[-len(queue) :] % len(queue)] = newest[-len(queue) :].to(queue.dtype)
