"""Every random choice is a function of its position, so that no generator state is ever stored.

(seed, epoch, sample) for data and augmentation, (seed, step, rank) for the rest: the number of
loader workers does not matter, and a resumed run draws what an uninterrupted one would have.
Data may draw from torch, random and numpy; models and losses from torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy
import numpy.typing
import torch


def derive(seed: int, *position: int | str) -> int:
    """Return a 63-bit seed for one purpose and place, e.g. ``derive(7, "order", epoch)``."""
    text = repr((seed, *position)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_sample(seed: int, epoch: int, index: int, repeat: int = 0) -> None:
    """Seed what transforms draw from: torch, Python's random and numpy's global generator.

    ``repeat`` tells apart the times a sample comes in one epoch.
    """
    seed_all(derive(seed, "sample", epoch, index, *([repeat] if repeat else [])))


def seed_reading(index: int) -> None:
    """Seed what a data set draws when it reads a sample of which there are fixed views."""
    seed_all(derive(0, "reading", index))


def seed_view(index: int, view: int, part: int = 0) -> None:
    """Seed what transforms draw for one of a sample's fixed views.

    It does not depend on the seed of a run, so that all runs share what is stored of the views.
    ``part`` tells apart transforms that are applied to a batch at a time.
    """
    seed_all(derive(0, "view", index, view, *([part] if part else [])))


def seed_all(value: int) -> None:
    """Seed all generators that data may draw from."""
    torch.default_generator.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value & 0xFFFFFFFF)


def uniforms(base: int, index: torch.Tensor, repeat: torch.Tensor, count: int) -> torch.Tensor:
    """Return numbers from 0 to below 1 for the samples of a batch, float32 (B, ``count``).

    Each is a function of ``base``, its sample's ``index`` and ``repeat``, and its own column: what
    else is in the batch does not matter. Multiples of 2^-24, all alike likely.

    Args:
        base: a seed, derived from what else they are to depend on.
        index: whole numbers (B).
        repeat: whole numbers (B) that tell apart the times a sample comes.
        count: columns.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number
    generators, OOPSLA 2014), applied to base, index, repeat and column one after the other.
    """
    state = numpy.uint64(base & 0xFFFF_FFFF_FFFF_FFFF)
    rows = _scrambled(index.numpy().astype(numpy.uint64) * _STEP + state)
    rows = _scrambled(repeat.numpy().astype(numpy.uint64) * _STEP + rows)
    columns = numpy.arange(1, count + 1, dtype=numpy.uint64) * _STEP
    numbers = _scrambled(rows[:, None] + columns) >> numpy.uint64(40)
    return torch.from_numpy(numbers.astype(numpy.float32) * numpy.float32(2**-24))


_STEP = numpy.uint64(0x9E37_79B9_7F4A_7C15)
_FIRST, _SECOND = numpy.uint64(0xBF58_476D_1CE4_E5B9), numpy.uint64(0x94D0_49BB_1331_11EB)
_SHIFTS = numpy.uint64(30), numpy.uint64(27), numpy.uint64(31)


def _scrambled(state: numpy.typing.NDArray[numpy.uint64]) -> numpy.typing.NDArray[numpy.uint64]:
    """Return 64 bits each of which depends on every bit of ``state``."""
    state = (state ^ (state >> _SHIFTS[0])) * _FIRST
    state = (state ^ (state >> _SHIFTS[1])) * _SECOND
    scrambled: numpy.typing.NDArray[numpy.uint64] = state ^ (state >> _SHIFTS[2])
    return scrambled


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


def torch_forked() -> AbstractContextManager[None]:
    """Return a context that leaves torch's generators as they were.

    Of GPUs it is the one that this process runs on, once it does, and no other: to ask all of a
    machine, as torch does by itself, wakes each of them up, and warns of it.
    """
    ours = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(ours)


@contextmanager
def seeded(seed: int, *position: int | str) -> Iterator[None]:
    """Let torch, random and numpy draw from one position; leave their generators as they were."""
    value = derive(seed, *position)
    states = random.getstate(), numpy.random.get_state()
    with torch_forked():
        torch.manual_seed(value)
        random.seed(value)
        numpy.random.seed(value & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
