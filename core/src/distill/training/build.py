"""Components of the file -> objects, with every failure told as a fault of the file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import randomness
from distill.config.experiment import Component, Experiment, Model
from distill.config.yaml_document import Path as ConfigPath
from distill.data.batch import collate
from distill.data.source import Source
from distill.errors import ConfigError, DataError, Fault, PluginError
from distill.registry import SINGULAR, Registry
from distill.signature import Problem, bind
from distill.training.checkpoint import load_weights
from distill.training.random_teacher import is_drawn, untrained

STORES = Path("stores")
"""Where outputs of teachers are stored unless said otherwise."""


class Builder:
    """Builds what an experiment describes.

    Args:
        experiment: the description.
        registry: where components are found.
        allow_remote_code: whether to build components that fetch code from elsewhere and run it.
        stores: the folder with stored outputs of teachers.
    """

    def __init__(
        self,
        experiment: Experiment,
        registry: Registry,
        *,
        allow_remote_code: bool = False,
        stores: Path = STORES,
    ):
        self.experiment = experiment
        self.registry = registry
        self.allow_remote_code = allow_remote_code
        self.stores = stores

    def component(self, kind: str, component: Component, *provided: Any) -> Any:
        """Build one component; ``provided`` are the arguments core gives it.

        Raises:
            ConfigError: if its name is unknown, its parameters do not fit, or it refuses them; or
                if it runs code from elsewhere and that is not allowed.
        """
        factory, arguments = self._bind(kind, component, len(provided))
        refused = self.refused(kind, component)
        if refused is not None:
            raise ConfigError([refused])
        try:
            return factory(*provided, **arguments)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            path, message = self._refusal(component, error)
            raise self.experiment.error(path, message) from error

    def faults(self, kind: str, component: Component, provided: int = 0) -> list[Fault]:
        """Return what is wrong with a component's name and parameters, without building it."""
        try:
            self._bind(kind, component, provided)
        except ConfigError as error:
            return list(error.faults)
        return []

    def refused(self, kind: str, component: Component) -> Fault | None:
        """Return the fault that a component runs code from elsewhere, unless that is allowed."""
        if self.allow_remote_code:
            return None
        try:
            factory = self.registry.find(kind, component.type).factory
        except PluginError:  # a fault of its own
            return None
        message = remote_code_refusal(component.type, factory, component.params)
        return self.experiment.fault(component.path, message) if message else None

    def components(self, kind: str, components: Sequence[Component]) -> list[Any]:
        """Build several components of one kind."""
        return [self.component(kind, component) for component in components]

    def model(self, name: str, seed: int) -> nn.Module:
        """Build a model: its initial weights depend on the seeds alone, then its checkpoint.

        Args:
            name: of the file, or of a random teacher as ``Role.instance`` has it.
            seed: of the run.
        """
        name, _, control = name.partition("@")
        spec = self.experiment.models[name]
        if control:
            model = self._random(spec, seed)
        else:
            with randomness.seeded(seed, "model", spec.seed):
                model = self.module("models", spec.component)
        if spec.checkpoint is not None and not control and not _on_meta():
            path = (*spec.component.path, "checkpoint")
            try:
                load_weights(model, Path(spec.checkpoint))
            except ValueError as error:
                raise self.experiment.error(path, str(error)) from error
        if spec.redesign is None:
            return model
        with randomness.seeded(seed, "redesign", spec.seed):
            return self.redesigned(spec.redesign, model, {})

    def _random(self, spec: Model, seed: int) -> nn.Module:
        """Build a model with weights that no other one of the run begins with."""
        component, drawn = untrained(spec.component), []
        for draw in range(2):
            with randomness.seeded(seed, "random teacher", spec.seed, draw):
                drawn.append(self.module("models", component))
        if not _on_meta() and not is_drawn(*drawn):
            message = (
                f"{component.type} comes with weights that no seed changes, so that it is no "
                "random_teacher; let its params build it without trained weights"
            )
            raise self.experiment.error(component.path, message)
        return drawn[0]

    def module(self, kind: str, component: Component, *provided: Any) -> nn.Module:
        """Build a component that has to be a module."""
        module = self.component(kind, component, *provided)
        if isinstance(module, nn.Module):
            return module
        message = f"{component.type} gave {type(module).__name__}, which is no nn.Module"
        raise self.experiment.error(component.path, message)

    def redesigned(
        self, component: Component, model: nn.Module, auxiliary: Mapping[str, nn.Module]
    ) -> nn.Module:
        """Return what a redesigner makes of a model.

        It is given ``auxiliary`` too, modules by name, if its second parameter is called so.
        """
        try:
            factory = self.registry.find("model_redesigners", component.type).factory
            wants_more = list(inspect.signature(factory).parameters)[1:2] == ["auxiliary"]
        except (PluginError, TypeError, ValueError):
            wants_more = False  # which is told when it is built
        provided = (model, auxiliary) if wants_more else (model,)
        return self.module("model_redesigners", component, *provided)

    def source(self, name: str) -> Source:
        """Open a data set; what it and its transforms draw when they are built is the same always.

        Raises:
            DataError: if its files are missing or it is empty.
        """
        spec = self.experiment.datasets[name]
        path = spec.component.path
        with randomness.seeded(self.experiment.seeds[0], "data set", name):
            try:
                dataset = self.component("datasets", spec.component)
            except ConfigError as error:
                # Its files, not its settings.
                if isinstance(error.__cause__, (OSError, RuntimeError)):
                    raise DataError(str(error)) from error
                raise
            for wrapper in spec.wrappers:
                dataset = self.component("dataset_wrappers", wrapper, dataset)
            joint = self.components("transforms", spec.joint_transforms)
            transforms = self.components("transforms", spec.transforms)
            batched = [self._batched(transform) for transform in spec.transforms]
            put_together = self.component("collates", spec.collate) if spec.collate else collate
        source = Source(name, dataset, transforms, joint, put_together, batched)
        if len(source) == 0:
            fault = self.experiment.fault(path, "the data set is empty")
            raise DataError(str(fault))
        return source

    def _batched(self, transform: Component) -> Any:
        """Return the form of a transform for whole batches, ``None`` if its plugin has none."""
        offers = self.registry.entries("batched_transforms")
        own = self.registry.find("transforms", transform.type)
        found = [e for e in offers if (e.name, e.provider) == (own.name, own.provider)]
        return self.component("batched_transforms", transform) if found else None

    def _bind(self, kind: str, component: Component, provided: int) -> tuple[Any, dict[str, Any]]:
        try:
            factory = self.registry.find(kind, component.type).factory
        except PluginError as error:
            path = self._type_path(component)
            raise self.experiment.error(path, str(error)) from error
        binding = bind(factory, component.params, provided=provided)
        if binding.problems:
            raise ConfigError(self._fault(kind, component, problem) for problem in binding.problems)
        return factory, binding.arguments

    def _type_path(self, component: Component) -> ConfigPath:
        with_type = (*component.path, "type")
        return with_type if with_type in self.experiment.document.locations else component.path

    def _fault(self, kind: str, component: Component, problem: Problem) -> Fault:
        path = (*component.path, "params", problem.key) if problem.key else component.path
        return self.experiment.fault(path, f"{SINGULAR[kind]} {component.type}: {problem.message}")

    def _refusal(self, component: Component, error: Exception) -> tuple[ConfigPath, str]:
        text = str(error).strip().split("\n")[0] or type(error).__name__
        for key in component.params:
            if isinstance(error, TypeError) and f"'{key}'" in text:
                return (*component.path, "params", key), f"{component.type}: {text}"
        return component.path, f"{component.type} cannot be built: {text}"


def remote_code_refusal(name: str, factory: Any, params: Mapping[str, Any]) -> str | None:
    """Return why a factory that runs code from elsewhere is not called; ``None`` for others."""
    describe = getattr(factory, "remote_code", None)
    if describe is None:
        return None
    try:
        source = describe(params)
    except Exception:  # foreign code, and parameters that need not fit: refused all the same
        source = "a place that it does not tell"
    return f"{name} runs code from {source}; allow it with --allow-remote-code"


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"
