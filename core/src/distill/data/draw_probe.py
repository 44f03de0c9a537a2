"""Whether anything has been drawn from the generators that data may draw from."""

from __future__ import annotations

import functools
import random

import numpy
import torch

from distill.randomness import derive, seed_all

PLACE = derive(0, "probe")
"""Where nobody else begins, as many do with a seed of 0."""


def restart_generators() -> None:
    """Set all generators that data may draw from to a known place."""
    seed_all(PLACE)


def has_drawn() -> bool:
    """Whether anything has been drawn since ``restart_generators``, which is done again."""
    moved = _next_numbers() != _first_numbers()
    restart_generators()
    return moved


def _next_numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(numpy.random.rand())


@functools.cache
def _first_numbers() -> tuple[float, float, float]:
    restart_generators()
    return _next_numbers()
