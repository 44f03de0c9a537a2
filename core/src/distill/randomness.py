"""Every random choice is a function of its position, so that no generator state is ever stored.

(seed, epoch, sample) for data and augmentation, (seed, step, rank) for the rest: the number of
loader workers does not matter, and a resumed run draws what an uninterrupted one would have.
Data may draw from torch, random and numpy; models and losses from torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def derive(seed: int, *position: int | str) -> int:
    """Return a 63-bit seed for one purpose and place, e.g. ``derive(7, "order", epoch)``."""
    text = repr((seed, *position)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_sample(seed: int, epoch: int, index: int, repeat: int = 0) -> None:
    """Seed what transforms draw from: torch, Python's random and numpy's global generator.

    ``repeat`` tells apart the times a sample comes in one epoch.
    """
    value = derive(seed, "sample", epoch, index, *([repeat] if repeat else []))
    torch.default_generator.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value & 0xFFFFFFFF)


def seed_step(base: int, step: int, device: torch.device) -> None:
    """Seed what models and losses draw from in one step: torch, on the CPU and on ``device``.

    ``base`` is derived once, and torch.manual_seed avoided, which takes half a millisecond while
    CUDA is not in use: this runs in every step of a loop that may take 300 microseconds in all.
    """
    value = (base + step) & 0x7FFF_FFFF_FFFF_FFFF
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


@contextmanager
def seeded(seed: int, *position: int | str) -> Iterator[None]:
    """Let torch, random and numpy draw from one position; leave their generators as they were."""
    value = derive(seed, *position)
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(value)
        random.seed(value)
        numpy.random.seed(value & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
