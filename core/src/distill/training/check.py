"""Everything that can be found wrong with an experiment before anything expensive starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from distill.config.experiment import Component, Experiment, Metric, Role, Stage, Teacher
from distill.errors import ConfigError, Fault, PluginError
from distill.registry import Registry
from distill.training.build import Builder
from distill.training.freezing import find_frozen
from distill.training.metrics import compares_with
from distill.training.optimizer import build_schedule
from distill.training.parameter_groups import parameter_groups
from distill.training.parts import Parts, is_built
from distill.training.split_gradients import terms_apart
from distill.training.stage import Assembly, assemble
from distill.training.teacher_store import check_encoding, check_temperature
from distill.undrawn import Undrawn

META = torch.device("meta")
T = TypeVar("T")


def check(
    experiment: Experiment, registry: Registry, *, allow_remote_code: bool = False
) -> list[Fault]:
    """Return all faults of components, parameters and references.

    Models, losses and auxiliary modules are built without memory; no data, checkpoint or weights
    are read. What runs code from elsewhere is built only where that is allowed. Not to be allowed
    is no fault; what refers to it is not checked.
    """
    checker = _Checker(Builder(experiment, registry, allow_remote_code=allow_remote_code))
    with META:
        checker.run()
    refused = set() if allow_remote_code else set(refusals(experiment, registry))
    return [fault for fault in checker.faults if fault not in refused]


def refuse_faults(
    experiment: Experiment, registry: Registry, *, allow_remote_code: bool = False
) -> None:
    """Check as ``check`` does, for a process that needs none of the models' initial values.

    Raises:
        ConfigError: with every fault of the file.
    """
    with Undrawn():
        faults = check(experiment, registry, allow_remote_code=allow_remote_code)
    if faults:
        raise ConfigError(faults)


def refusals(experiment: Experiment, registry: Registry) -> list[Fault]:
    """Return as faults which components run code from elsewhere, each one once."""
    builder = Builder(experiment, registry)
    refused = [builder.refused(kind, component) for kind, component in _components(experiment)]
    return list(dict.fromkeys(fault for fault in refused if fault is not None))


class _Checker:
    def __init__(self, builder: Builder):
        self.builder = builder
        self.experiment = builder.experiment
        self.faults: list[Fault] = []

    def run(self) -> None:
        for kind, component, provided in _opened_later(self.experiment):
            self.faults += self.builder.faults(kind, component, provided)
        with torch.device("cpu"):  # some compute with small tensors
            for kind, component in _built_at_once(self.experiment):
                self._attempt(self.builder.component, kind, component)
        models = {
            name: self._attempt(self.builder.model, name, 0) for name in self.experiment.models
        }
        built = {name: model for name, model in models.items() if model is not None}
        for role in (role for stage in self.experiment.stages for role in stage.roles.values()):
            if role.model in built and role.instance not in built:
                drawn = self._attempt(self.builder.model, role.instance, 0)
                built.update({role.instance: drawn} if drawn is not None else {})
        parts = Parts()
        for stage in self.experiment.stages:
            self._stage(stage, built, parts)
        self._test_metrics()

    def _stage(self, stage: Stage, models: dict[str, nn.Module], parts: Parts) -> None:
        assembly = assemble(self.builder, stage, models, parts, 0, META)
        self.faults += assembly.faults
        if all(name in models for name in stage.models):
            if assembly.distiller is not None:
                assembly.distiller.release()
                for role, teacher in stage.teachers.items():
                    asked = assembly.distiller.addresses_of(role)
                    self._attempt(check_encoding, self.builder, teacher, role, asked)
                    losses = assembly.distiller.criterion.calls
                    self._attempt(check_temperature, self.builder, teacher, role, losses)
                    if any(address.value == role and not address.keys for address in asked):
                        self._stored_logits(teacher)
            self._selections(stage, assembly)
        if stage.optimizer.component.type:  # else it is missing, which is a fault of the frame
            self._optimization(stage)
        self._metrics(stage)

    def _stored_logits(self, teacher: Teacher) -> None:
        """Look whether a store keeps fewer logits than there are, where that is known."""
        classes, place = self._classes(teacher), (*teacher.path, "store")
        if teacher.store is None or teacher.store.encoding != "top_k" or classes is None:
            return
        if self.experiment.gaps.explain(place, "top"):
            return
        if classes <= teacher.store.top:
            message = (
                f"top_k keeps fewer logits than there are: '{teacher.model}' has {classes}, and "
                f"top is {teacher.store.top}; write a smaller top, or encoding: float16"
            )
            top = (*place, "top")
            path = top if top in self.experiment.document.locations else (*place, "encoding")
            self.faults.append(self.experiment.fault(path, message))

    def _classes(self, role: Role) -> int | None:
        """Return how many logits a model gives, if its ``num_classes`` says so."""
        model = self.experiment.models.get(role.model)
        if model is None or model.redesign or role.special or role.redesign:
            return None
        try:
            factory = self.builder.registry.find("models", model.component.type).factory
            usual = inspect.signature(factory).parameters.get("num_classes")
        # Which is a fault of its own, or code that tells nothing of itself.
        except (PluginError, TypeError, ValueError):
            return None
        given = model.component.params.get("num_classes", usual.default if usual else None)
        return given if type(given) is int and given > 0 else None  # 0: without a classifier

    def _selections(self, stage: Stage, assembly: Assembly) -> None:
        """Look whether what the file freezes and groups is there, unless it is not built yet."""
        if any(map(assembly.parts.is_unset, assembly.trained().values())):
            return
        self.faults += find_frozen(self.builder, assembly).faults
        if stage.optimizer.component.type and not assembly.faults:
            self._attempt(parameter_groups, self.builder, stage, assembly.trained())

    def _optimization(self, stage: Stage) -> None:
        # With memory and two dimensions, since some optimizers refuse what has not.
        parameters = [nn.Parameter(torch.zeros(1, 1, device="cpu"))]
        optimizer = self._attempt(
            self.builder.component, "optimizers", stage.optimizer.component, parameters
        )
        if optimizer is not None:
            self._attempt(terms_apart, self.builder, stage, optimizer)
        # One by one, so that each one's faults are told.
        for entry in stage.schedulers:
            if optimizer is None:
                self.faults += self.builder.faults("schedulers", entry.component, provided=1)
            else:
                alone = replace(stage, schedulers=(replace(entry, until=None),))
                self._attempt(build_schedule, self.builder, alone, optimizer)

    def _metrics(self, stage: Stage) -> None:
        """Build a stage's metrics; one that compares with a teacher needs that teacher."""
        for entry in stage.metrics:
            metric = self._attempt(self.builder.component, "metrics", entry.component)
            role = compares_with(metric) if metric is not None else None
            self._top_k(entry, metric, [stage])
            if role is not None and role not in stage.teachers:
                self._fault(entry, f"stage '{stage.name}' has no teacher '{role}' to compare with")

    def _test_metrics(self) -> None:
        """The same for the test, where a stage without the teacher leaves the metric out."""
        roles = {role for stage in self.experiment.stages for role in stage.teachers}
        for entry in self.experiment.test.metrics if self.experiment.test else ():
            metric = self._attempt(self.builder.component, "metrics", entry.component)
            role = compares_with(metric) if metric is not None else None
            self._top_k(entry, metric, self.experiment.stages)
            if role is not None and role not in roles:
                self._fault(entry, f"no stage has a teacher '{role}' to compare with")

    def _top_k(self, entry: Metric, metric: Any, stages: Sequence[Stage]) -> None:
        """Refuse to count as right what is among more classes than there are."""
        wanted = getattr(metric, "classes_needed", None)
        known = [self._classes(stage.student) for stage in stages]
        classes = min((number for number in known if number is not None), default=None)
        if wanted is not None and classes is not None and wanted > classes:
            what = f"counts the first {wanted} of {classes} classes, which is all"
            self._fault(entry, f"{what}: write a smaller top_k")

    def _fault(self, metric: Metric, message: str) -> None:
        self.faults.append(self.experiment.fault(metric.component.path, message))

    def _attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        try:
            return function(*args)
        except ConfigError as error:
            self.faults.extend(error.faults)
            return None


def _opened_later(experiment: Experiment) -> Iterator[tuple[str, Component, int]]:
    """Yield components whose building may read files or data, and how many arguments are given."""
    for dataset in experiment.datasets.values():
        yield "datasets", dataset.component, 0
        for wrapper in dataset.wrappers:
            yield "dataset_wrappers", wrapper, 1
    for stage in experiment.stages:
        if stage.data.sampler:
            yield "samplers", stage.data.sampler, 1
        if stage.data.batch_sampler:
            yield "batch_samplers", stage.data.batch_sampler, 2
    for observer in experiment.observers:
        yield "observers", observer, 0


def _components(experiment: Experiment) -> Iterator[tuple[str, Component]]:
    """Yield every component of the file; an inherited one once for each stage."""
    for kind, component, _ in _opened_later(experiment):
        yield kind, component
    yield from _built_at_once(experiment)
    for model in experiment.models.values():
        yield "models", model.component
        if model.redesign is not None:
            yield "model_redesigners", model.redesign
    for stage in experiment.stages:
        yield from _wired(stage)
        for role in stage.roles.values():
            if role.special is not None:
                yield "special_modules", role.special
            if role.redesign is not None:
                yield "model_redesigners", role.redesign
        yield "optimizers", stage.optimizer.component
        for entry in stage.schedulers:
            yield "schedulers", entry.component
    measured = [*(stage.metrics for stage in experiment.stages)]
    measured += [experiment.test.metrics] if experiment.test else []
    for metric in chain.from_iterable(measured):
        yield "metrics", metric.component


def _wired(stage: Stage) -> Iterator[tuple[str, Component]]:
    for module in stage.auxiliary.values():
        if is_built(module):
            yield "auxiliary_modules", module.component
    for term in stage.criterion.values():
        yield "losses", term.component


def _built_at_once(experiment: Experiment) -> Iterator[tuple[str, Component]]:
    for dataset in experiment.datasets.values():
        for transform in (*dataset.joint_transforms, *dataset.transforms):
            yield "transforms", transform
        if dataset.collate:
            yield "collates", dataset.collate
    for stage in experiment.stages:
        for transform in stage.data.batch_transforms:
            yield "batch_transforms", transform
