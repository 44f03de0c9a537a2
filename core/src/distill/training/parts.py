"""Auxiliary modules, losses and adapters: built once, found again by the stages that carry on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distill import randomness
from distill.config.experiment import Auxiliary, Component, Stage
from distill.errors import ConfigError, Fault, PluginError
from distill.model.adapter import Adapter
from distill.training.build import Builder

PartKey = tuple[str, str, str]
"""Kind, stage that wrote it, name."""


@dataclass
class Parts:
    """What lives on through the stages beside the models.

    Attributes:
        modules: by key.
        unset: keys of modules that are still to find their shapes in what they are fed.
        saved: states from a checkpoint by key, until their modules are there again.
        data: name of the data set that a module was set up with, where it asked for it.
    """

    modules: dict[PartKey, nn.Module] = field(default_factory=dict)
    unset: set[PartKey] = field(default_factory=set)
    saved: dict[PartKey, Mapping[str, Any]] = field(default_factory=dict)
    data: dict[PartKey, str] = field(default_factory=dict)

    def add(self, key: PartKey, module: nn.Module) -> None:
        """Take in a new module."""
        self.modules[key] = module
        if hasattr(module, "setup"):
            self.unset.add(key)

    def key(self, module: nn.Module) -> PartKey:
        """Return the key of a module."""
        return next(key for key, part in self.modules.items() if part is module)

    def is_unset(self, module: nn.Module) -> bool:
        """Whether a module is still to find its shapes."""
        return any(self.modules[key] is module for key in self.unset)

    def to(self, device: torch.device) -> None:
        """Put all modules on a device."""
        for module in self.modules.values():
            module.to(device)

    def copied(self) -> Parts:
        """Return copies of all modules."""
        return Parts({key: copy.deepcopy(part) for key, part in self.modules.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all that have their layers, or had them in the checkpoint."""
        states: dict[PartKey, Any] = {
            key: part.state_dict() for key, part in self.modules.items() if key not in self.unset
        }
        states.update(self.saved)
        return {"|".join(key): state for key, state in states.items()}

    def resume_from(self, states: Mapping[str, Any]) -> None:
        """Let modules that will be built go on from saved states."""
        for text, state in states.items():
            kind, stage, name = text.split("|")
            self.saved[kind, stage, name] = state

    def restore(self) -> None:
        """Give modules that have found their shapes their saved states."""
        for key in [key for key in self.saved if key in self.modules and key not in self.unset]:
            self.modules[key].load_state_dict(self.saved.pop(key))


@dataclass
class Maker:
    """Builds the parts of one stage, or finds them among those of stages before."""

    builder: Builder
    stage: Stage
    parts: Parts
    seed: int
    device: torch.device
    faults: list[Fault]

    def auxiliary(self) -> dict[str, nn.Module]:
        """Return the auxiliary modules by name, less those that are a model's."""
        return self._all(
            {
                name: (("auxiliary_modules", *module.origin), module.component)
                for name, module in self.stage.auxiliary.items()
                if is_built(module)
            }
        )

    def losses(self) -> dict[str, nn.Module]:
        """Return the losses by name."""
        origin = self.stage.origins.get("criterion", self.stage.name)
        return self._all(
            {
                name: (("losses", origin, name), term.component)
                for name, term in self.stage.criterion.items()
            }
        )

    def adapter(self, term: str) -> nn.Module:
        """Return the adapter of a term."""
        key = ("adapters", self.stage.origins.get("criterion", self.stage.name), term)
        if key not in self.parts.modules:
            self.parts.add(key, Adapter())
        return self.parts.modules[key]

    def factory(self, kind: str, component: Component) -> Callable[..., Any] | None:
        """Return what builds a part, if there is such a component."""
        try:
            found: Callable[..., Any] = self.builder.registry.find(kind, component.type).factory
        except PluginError:
            return None
        return found

    def _all(self, described: Mapping[str, tuple[PartKey, Component]]) -> dict[str, nn.Module]:
        built = {}
        for name, (key, component) in described.items():
            if key not in self.parts.modules:
                module = self._build(key, component)
                if module is None:
                    continue
                self.parts.add(key, module)
            built[name] = self.parts.modules[key]
        return built

    def _build(self, key: PartKey, component: Component) -> nn.Module | None:
        try:
            with randomness.seeded(self.seed, *key):
                return self.builder.module(key[0], component).to(self.device)
        except ConfigError as error:
            self.faults.extend(error.faults)
            return None


def is_built(module: Auxiliary) -> bool:
    """Whether an auxiliary module is one of its own; not so a model's, or a faulty one."""
    return module.module is None and bool(module.component.type)
