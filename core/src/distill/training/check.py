"""Everything that can be found wrong with an experiment before anything expensive starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from distill.config.experiment import Component, Experiment, Stage
from distill.errors import ConfigError, Fault
from distill.registry import Registry
from distill.training.build import Builder
from distill.training.optimizer import build_scheduler
from distill.training.stage import Parts, assemble

META = torch.device("meta")
T = TypeVar("T")


def check(experiment: Experiment, registry: Registry) -> list[Fault]:
    """Return all faults of components, parameters and references.

    Models, losses and auxiliary modules are built without memory; no data, checkpoint or weights
    are read.
    """
    checker = _Checker(Builder(experiment, registry))
    with META:
        checker.run()
    return checker.faults


class _Checker:
    def __init__(self, builder: Builder):
        self.builder = builder
        self.experiment = builder.experiment
        self.faults: list[Fault] = []

    def run(self) -> None:
        for kind, component in _opened_later(self.experiment):
            self.faults += self.builder.faults(kind, component)
        for kind, component in _built_at_once(self.experiment):
            self._attempt(self.builder.component, kind, component)
        models = {
            name: self._attempt(self.builder.model, name, 0) for name in self.experiment.models
        }
        built = {name: model for name, model in models.items() if model is not None}
        parts: Parts = {}
        for stage in self.experiment.stages:
            self._stage(stage, built, parts)

    def _stage(self, stage: Stage, models: dict[str, nn.Module], parts: Parts) -> None:
        used = [stage.student.model, *(teacher.model for teacher in stage.teachers.values())]
        if all(name in models for name in used):
            assembly = assemble(self.builder, stage, models, parts, 0, META)
            self.faults += assembly.faults
            if assembly.distiller is not None:
                assembly.distiller.release()
        else:
            for kind, component in _wired(stage):
                self.faults += self.builder.faults(kind, component)
        if stage.optimizer.type:  # else it is missing, which is a fault of the frame
            self._optimization(stage)

    def _optimization(self, stage: Stage) -> None:
        # With memory and two dimensions, since some optimizers refuse what has not.
        parameters = [nn.Parameter(torch.zeros(1, 1, device="cpu"))]
        optimizer = self._attempt(self.builder.component, "optimizers", stage.optimizer, parameters)
        if stage.scheduler is None:
            return
        if optimizer is None:
            self.faults += self.builder.faults("schedulers", stage.scheduler, provided=1)
        else:
            self._attempt(build_scheduler, self.builder, stage, optimizer)

    def _attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        try:
            return function(*args)
        except ConfigError as error:
            self.faults.extend(error.faults)
            return None


def _opened_later(experiment: Experiment) -> Iterator[tuple[str, Component]]:
    """Yield the components whose building may read files."""
    for dataset in experiment.datasets.values():
        yield "datasets", dataset.component
    for observer in experiment.observers:
        yield "observers", observer


def _wired(stage: Stage) -> Iterator[tuple[str, Component]]:
    for module in stage.auxiliary.values():
        yield "auxiliary_modules", module.component
    for term in stage.criterion.values():
        yield "losses", term.component


def _built_at_once(experiment: Experiment) -> Iterator[tuple[str, Component]]:
    for dataset in experiment.datasets.values():
        for transform in dataset.transforms:
            yield "transforms", transform
    for stage in experiment.stages:
        for metric in stage.metrics:
            yield "metrics", metric
    if experiment.test is not None:
        for metric in experiment.test.metrics:
            yield "metrics", metric
