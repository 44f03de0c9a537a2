"""Whether a teacher is given the same in every epoch, without which nothing stored is of use."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from distill import randomness
from distill.config.experiment import Component, Stage
from distill.data.batch import collate
from distill.data.source import Source
from distill.errors import ConfigError, DataError, Fault, PluginError
from distill.training.build import Builder

DRAWN_ANEW = (
    "{} random numbers in every epoch, so that the teacher never sees an image of data set '{}' "
    "twice and nothing stored of it could be used again; write data: {{views: 4}} to draw 4 views "
    "of each sample once and for all, or take out what is random"
)
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
    raise builder.experiment.error(path, DRAWN_ANEW.format("its transforms draw", source.name))


def faults_of_transforms(builder: Builder, stage: Stage) -> Iterator[Fault]:
    """Yield what ``check_repeats`` finds, as far as transforms say of themselves that they draw.

    Those say so that have a form for whole batches. No data is opened.
    """
    described = builder.experiment.datasets.get(stage.data.train)
    if described is None or stage.data.views is not None:
        return
    drawing = [entry.type for entry in described.transforms if _says_it_draws(builder, entry)]
    for teacher in stage.teachers.values() if drawing else ():
        if teacher.store is not None:
            who = f"{' and '.join(drawing)} draw{'s' if len(drawing) == 1 else ''}"
            message = DRAWN_ANEW.format(who, stage.data.train)
            yield builder.experiment.fault((*teacher.path, "store"), message)


def _says_it_draws(builder: Builder, transform: Component) -> bool:
    try:
        form = builder.batched_form(transform)
    except (ConfigError, PluginError):  # told where it is built
        return False
    return form is not None and form.draws > 0


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
