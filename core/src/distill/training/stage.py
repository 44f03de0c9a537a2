"""A stage's description -> its Distiller: modules built or carried on, references wired."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distill import randomness
from distill.config.experiment import Component, Experiment, Stage, Wired
from distill.errors import ConfigError, DistillError, Fault, did_you_mean
from distill.model.capture import find_module, split_path, unknown_module
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller, value_name
from distill.model.wiring import Address, Call
from distill.reference import BATCH_VALUES, DEFAULT_WIRED, STUDENT, TEACHER, Reference
from distill.signature import wired_parameters
from distill.training.build import Builder
from distill.training.selection import select_parameters

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}

Parts = dict[tuple[str, str, str], nn.Module]
"""Auxiliary modules and losses that live: (kind, stage that wrote it, name) -> module."""


@dataclass
class Assembly:
    """A stage put together.

    Attributes:
        roles: student and teachers by role.
        auxiliary: auxiliary modules by name.
        terms: loss modules by name.
        frozen: parameters of student and auxiliary modules that stay as they are.
        faults: what kept it from being put together; if there are any, ``distiller`` is ``None``.
    """

    stage: Stage
    roles: Mapping[str, nn.Module]
    auxiliary: dict[str, nn.Module] = field(default_factory=dict)
    terms: dict[str, nn.Module] = field(default_factory=dict)
    frozen: list[nn.Parameter] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    distiller: Distiller | None = None

    def trained(self) -> dict[str, nn.Module]:
        """Return what the stage trains, by the names that the file selects parameters by."""
        terms = {f"criterion.{name}": term for name, term in self.terms.items()}
        return {STUDENT: self.roles[STUDENT], **self.auxiliary, **terms}

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of what the stage trains, less the frozen."""
        parameters = {id(p): p for module in self.trained().values() for p in module.parameters()}
        return [p for p in parameters.values() if p.requires_grad]


def assemble(
    builder: Builder,
    stage: Stage,
    models: Mapping[str, nn.Module],
    parts: Parts,
    seed: int,
    device: torch.device,
) -> Assembly:
    """Wire a stage; modules that it inherits are taken from ``parts``, new ones are put there."""
    roles = {STUDENT: models[stage.student.model]}
    roles.update({role: models[teacher.model] for role, teacher in stage.teachers.items()})
    assembly = Assembly(stage, roles)
    wiring = _Wiring(builder, assembly)
    make = _Maker(builder, stage, parts, seed, device, assembly.faults)
    assembly.auxiliary = make.modules("auxiliary_modules", "auxiliary", stage.auxiliary)
    assembly.terms = make.modules("losses", "criterion", stage.criterion)
    auxiliary = wiring.calls(stage.auxiliary, assembly.auxiliary)
    terms = wiring.calls(stage.criterion, assembly.terms)
    assembly.frozen = _frozen(builder, assembly)
    if not assembly.faults:
        weights = {name: term.weight for name, term in stage.criterion.items()}
        assembly.distiller = Distiller(
            student=roles[STUDENT],
            teachers={role: model for role, model in roles.items() if role != STUDENT},
            auxiliary=auxiliary,
            criterion=Criterion(terms, weights),
            captures=wiring.captures,
            autocast=(device.type, REDUCED[stage.precision])
            if stage.precision in REDUCED
            else None,
        )
    return assembly


def _frozen(builder: Builder, assembly: Assembly) -> list[nn.Parameter]:
    frozen = []
    for number, entry in enumerate(assembly.stage.freeze):
        try:
            frozen += select_parameters(entry, assembly.trained())
        except DistillError as error:
            path = (*assembly.stage.places["freeze"], number)
            assembly.faults.append(builder.experiment.fault(path, str(error)))
    return frozen


@dataclass
class _Maker:
    builder: Builder
    stage: Stage
    parts: Parts
    seed: int
    device: torch.device
    faults: list[Fault]

    def modules(
        self, kind: str, section: str, described: Mapping[str, Wired]
    ) -> dict[str, nn.Module]:
        """Build a section's modules, or take those of the stage that the section comes from."""
        origin = self.stage.origins.get(section, self.stage.name)
        built = {}
        for name, part in described.items():
            key = (kind, origin, name)
            if key not in self.parts:
                module = self._build(kind, key, part.component)
                if module is None:
                    continue
                self.parts[key] = module
            built[name] = self.parts[key]
        return built

    def _build(
        self, kind: str, key: tuple[str, str, str], component: Component
    ) -> nn.Module | None:
        try:
            with randomness.seeded(self.seed, *key):
                module = self.builder.component(kind, component)
        except ConfigError as error:
            self.faults.extend(error.faults)
            return None
        if not isinstance(module, nn.Module):
            message = f"{component.type} gave {type(module).__name__}, which is no nn.Module"
            self.faults.append(self.builder.experiment.fault(component.path, message))
            return None
        return module.to(self.device)


@dataclass
class _Wiring:
    builder: Builder
    assembly: Assembly
    captures: dict[str, list[str]] = field(default_factory=dict)

    def calls(
        self,
        described: Mapping[str, Wired],
        modules: Mapping[str, nn.Module],
    ) -> list[Call]:
        """Find the address of every argument; what has none is a fault."""
        return [
            Call(name, modules[name], self._arguments(part, modules[name]))
            for name, part in described.items()
            if name in modules
        ]

    def _arguments(self, part: Wired, module: nn.Module) -> dict[str, Address]:
        path = part.component.path
        wanted = wired_parameters(module.forward)
        open_ended = _takes_any(module.forward)
        addresses = {}
        unknown = [name for name in part.inputs if name not in wanted and not open_ended]
        for name, ref in part.inputs.items():
            if name in unknown:
                hint = did_you_mean(name, wanted) or f" (it takes: {', '.join(wanted)})"
                text = f"{part.component.type} takes no input '{name}'{hint}"
                self._fault((*path, "inputs", name), text)
            address = self._address(ref, (*path, "inputs", name))
            if address is not None:
                addresses[name] = address
        for name, required in wanted.items():
            if name in part.inputs or self._is_told((*path, "inputs"), name, unknown):
                continue
            if name in DEFAULT_WIRED and (name in self.assembly.roles or name == "targets"):
                addresses[name] = Address(name, name)
            elif required and not self._is_teacher_lost(name):
                self._fault(path, self._unwired(part, name))
        return addresses

    def _is_told(self, path: tuple[str | int, ...], name: str, unknown: list[str]) -> bool:
        """Whether an input is missing for a fault already told: it is misspelt or unreadable."""
        gaps = self.builder.experiment.gaps
        return gaps.explain(path, name) or any(did_you_mean(other, [name]) for other in unknown)

    def _is_teacher_lost(self, name: str) -> bool:
        number = int(self.assembly.stage.path[1])
        gaps = self.builder.experiment.gaps
        return name == TEACHER and any(
            gaps.explain(("stages", n), key)
            for n in range(number + 1)
            for key in ("teacher", "teachers")
        )

    def _unwired(self, part: Wired, name: str) -> str:
        stage = self.assembly.stage
        if name == "teacher" and not stage.teachers:
            return f"{part.component.type} needs a teacher, and stage '{stage.name}' has none"
        return (
            f"{part.component.type} needs the input '{name}'; wire it, "
            f"e.g. inputs: {{{name}: student}}"
        )

    def _address(self, ref: Reference, path: tuple[str | int, ...]) -> Address | None:
        keys = tuple(ref.path.split(".")) if ref.path else ()
        if ref.owner in self.assembly.roles:
            return self._model_address(ref, path)
        if ref.owner in BATCH_VALUES:
            return Address(ref.text, ref.owner, keys)
        if ref.owner not in self.assembly.stage.auxiliary:
            return None  # already a fault of the file's frame
        if ref.of_input:
            self._fault(path, f"'{ref.text}': name what feeds '{ref.owner}' itself instead")
        return Address(ref.text, ref.owner, keys)

    def _model_address(self, ref: Reference, path: tuple[str | int, ...]) -> Address | None:
        model = self.assembly.roles[ref.owner]
        module_path, key = split_path(model, ref.path)
        module = find_module(model, module_path)
        if key and (ref.of_input or not _may_have_part(model, module, ref.path)):
            self._fault(path, f"'{ref.text}': {unknown_module(model, ref.path)}")
            return None
        keys = tuple(key.split(".")) if key else ()
        if not module_path and not ref.of_input:
            return Address(ref.text, ref.owner, keys)
        captured = module_path + (":input" if ref.of_input else "")
        self.captures.setdefault(ref.owner, []).append(captured)
        return Address(ref.text, value_name(ref.owner, captured), keys)

    def _fault(self, path: tuple[str | int, ...], message: str) -> None:
        self.assembly.faults.append(self.builder.experiment.fault(path, message))


def _takes_any(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _may_have_part(model: nn.Module, module: nn.Module, path: str) -> bool:
    """Whether what follows a submodule's path may be a key of its output.

    Only a forward tells for sure; before one, a hint that it returns a tensor, or a submodule of
    nearly that name, means that the path is wrong.
    """
    try:
        returned = typing.get_type_hints(module.forward).get("return")
    except (NameError, TypeError, AttributeError):
        returned = None
    paths = [name for name, _ in model.named_modules() if name]
    return returned is not torch.Tensor and not did_you_mean(path, paths)


def module_error(
    experiment: Experiment, assembly: Assembly, module: nn.Module, message: str
) -> ConfigError:
    """Return an error at the place where the file asks for a loss or auxiliary module."""
    stage = assembly.stage
    sections: list[tuple[Mapping[str, Wired], Mapping[str, nn.Module]]] = [
        (stage.auxiliary, assembly.auxiliary),
        (stage.criterion, assembly.terms),
    ]
    for described, modules in sections:
        for name, candidate in modules.items():
            if candidate is module:
                return experiment.error(described[name].component.path, message)
    raise AssertionError("a module that failed belongs to its stage")


@contextmanager
def roles_in_force(assembly: Assembly) -> Iterator[None]:
    """Freeze what the stage freezes and put teachers in their mode; undo all of it afterwards."""
    modules = [*assembly.roles.values(), *assembly.auxiliary.values(), *assembly.terms.values()]
    parameters = [p for module in modules for p in module.parameters()]
    before = [p.requires_grad for p in parameters]
    modes = {part: part.training for module in modules for part in module.modules()}
    for role, teacher in assembly.stage.teachers.items():
        assembly.roles[role].requires_grad_(False).train(teacher.mode == "train")
    for parameter in assembly.frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
        for part, mode in modes.items():
            part.training = mode
        if assembly.distiller is not None:
            assembly.distiller.release()
