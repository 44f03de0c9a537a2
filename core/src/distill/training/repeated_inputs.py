"""Whether a teacher is given the same in every epoch, without which nothing stored is of use."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from distill import randomness
from distill.config.experiment import Stage
from distill.data.batch import collate
from distill.data.source import Source
from distill.errors import DataError
from distill.training.build import Builder

LOOKED_AT = 8
"""So many samples are read to find out whether anything draws random numbers."""


def check_repeats(builder: Builder, stage: Stage, role: str, source: Source) -> None:
    """Refuse a store for inputs that are drawn anew in every epoch.

    Raises:
        ConfigError: with the two ways out.
    """
    path = (*stage.teachers[role].path, "store")
    if _collate_draws(source):
        message = (
            f"data set '{source.name}' has a collate function that draws random numbers, which no "
            "view fixes; a batch transform can be had with views"
        )
        raise builder.experiment.error(path, message)
    if stage.data.views is not None or not _draws(source):
        return
    message = (
        "its transforms draw random numbers in every epoch, so that the teacher never sees an "
        f"image of data set '{source.name}' twice and nothing stored of it could be used again; "
        "write data: {views: 4} to draw 4 views of each sample once and for all, or take out what "
        "is random"
    )
    raise builder.experiment.error(path, message)


def _collate_draws(source: Source) -> bool:
    if source.collate is collate:
        return False
    with randomness.seeded(0, "a look at a collate function"):
        try:
            samples = [source.read(index) for index in range(min(2, len(source)))]
            before = _generators()
            source.collate(samples)
        except Exception:  # foreign code, which the rehearsal tells of
            return False
        return _generators() != before


def _draws(source: Source) -> bool:
    """Whether reading a sample draws random numbers."""
    with randomness.seeded(0, "a look at transforms"):
        for index in range(min(LOOKED_AT, len(source))):
            before = _generators()
            try:
                source.read(index)
            except DataError:  # told when it is read for training
                continue
            if _generators() != before:
                return True
    return False


def _generators() -> tuple[Any, ...]:
    """Return the states of all generators that data may draw from."""
    name, keys, *rest = numpy.random.get_state()
    return (
        torch.random.get_rng_state().numpy().tobytes(),
        random.getstate(),
        (name, numpy.asarray(keys).tobytes(), *rest),
    )
