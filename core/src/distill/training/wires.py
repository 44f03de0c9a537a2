"""References of a stage -> where their values are found, and what must be captured for them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.config.experiment import Auxiliary, Experiment, Stage, Term, Wired
from distill.config.yaml_document import Path
from distill.errors import Fault, did_you_mean
from distill.model.capture import find_module, split_path, unknown_module
from distill.model.wiring import Address, Call, Source, value_name
from distill.reference import (
    BATCH_VALUES,
    DEFAULT_WIRED,
    STUDENT,
    TEACHER,
    Reference,
    Wires,
    each_reference,
)
from distill.signature import wired_parameters

NEW = object.__dict__["__new__"]
"""Of classes that build nothing but themselves."""


@dataclass
class Wiring:
    """Finds where arguments come from; what comes from nowhere is a fault.

    Attributes:
        models: by role, and peers of the student by name, as the stage runs them.
        originals: likewise, as they are otherwise.
        unknown: of ``models``, those that could not be built or redesigned, so that it is not known
            what they have.
        captures: role -> paths of what must be captured.
        parameters: name of a value -> the module and its parameter's or buffer's name.
        placed: auxiliary module that a redesigned model calls itself -> where its output is.
        rows: such a module -> the role of the model.
    """

    experiment: Experiment
    stage: Stage
    models: Mapping[str, nn.Module]
    originals: Mapping[str, nn.Module]
    faults: list[Fault]
    unknown: Collection[str] = ()
    captures: dict[str, list[str]] = field(default_factory=dict)
    parameters: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    placed: dict[str, Address] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    def place(self, auxiliary: Mapping[str, nn.Module]) -> None:
        """Find the auxiliary modules that a redesigned model calls itself, to capture them."""
        for name, module in auxiliary.items():
            for role, model in self.models.items():
                path = _path_in(model, module)
                if path is not None:
                    self.captures.setdefault(role, []).append(path)
                    self.placed[name] = Address(name, value_name(role, path))
                    self.rows[name] = role
                    self._check_unfed(name)

    def _check_unfed(self, name: str) -> None:
        module = self.stage.auxiliary[name]
        if module.inputs:
            message = f"'{name}' stands in a model's row and takes what comes there; give no inputs"
            self._fault((*module.component.path, "inputs"), message)

    def module(self, auxiliary: Auxiliary) -> nn.Module | None:
        """Return the model's module that an auxiliary one is."""
        ref = auxiliary.module
        assert ref is not None
        place = (*auxiliary.component.path, "module")
        if ref.owner not in self.models or ref.tap or not ref.path:
            roles = ", ".join(f"{role}.<module>" for role in self.models)
            self._fault(place, f"'{ref.text}' is no module of a model; write one of {roles}")
            return None
        model = self.originals[ref.owner]
        path, rest = split_path(model, ref.path)
        if rest and ref.owner in self.unknown:
            return None
        if rest:
            self._fault(place, f"'{ref.text}': {unknown_module(model, ref.path)}")
            return None
        self._check_whole(f"'{ref.text}'", place)
        return model.get_submodule(path)

    def _check_whole(self, what: str, path: Path) -> None:
        """Refuse what only has a value while FSDP has gathered the model around it."""
        if self.stage.parallel == "fsdp":
            message = (
                f"{what} is used outside of its model's forward, where this stage's parallel: fsdp "
                "has no whole parameters; that needs parallel: ddp"
            )
            self._fault(path, message)

    def call(self, name: str, part: Wired, module: nn.Module) -> Call:
        """Find the address of every argument."""
        return Call(name, module, self._arguments(part, module.forward))

    def check_unbuilt(self, part: Wired, factory: Callable[..., Any] | None) -> None:
        """Find what is wrong with the inputs of a module whose building failed.

        Args:
            part: the module.
            factory: what was to build it, if that is known; a class tells what it takes by a
                ``forward`` of its own.
        """
        forward = _forward_of(factory)
        if forward is not None:
            self._arguments(part, partial(forward, None))
            return
        for name, wires in part.inputs.items():
            self._source(wires, (*part.component.path, "inputs", name))

    def adapted(self, name: str, term: Term, call: Call, adapter: nn.Module) -> list[Call]:
        """Put an adapter between the student's features and a term: its call, then the term's."""
        pairs = {s: t for s, t in self._pairs(term) if {s, t} <= call.arguments.keys()}
        if not pairs:
            message = (
                "finds nothing to adapt: 'inputs' has to wire features of the student, as "
                "'student_features', and the teacher's beside them, as 'teacher_features'"
            )
            if term.inputs.keys() <= call.arguments.keys():  # else that is told already
                self._fault((*term.component.path, "adapter"), message)
            return [call]
        value = f"{name}.adapter"
        features: list[Address] = []
        like: list[Address] = []
        adapted = dict(call.arguments)
        for student, teacher in pairs.items():
            source = call.arguments[student]
            first, given = len(features), _as_tuple(source)
            places = [Address(a.text, value, (str(first + n),)) for n, a in enumerate(given)]
            adapted[student] = places[0] if isinstance(source, Address) else tuple(places)
            features += given
            like += _as_tuple(call.arguments[teacher])
        adapting = {"features": tuple(features), "like": tuple(like)}
        return [Call(value, adapter, adapting), Call(name, call.module, adapted)]

    def _pairs(self, term: Term) -> list[tuple[str, str]]:
        """Pair a term's inputs from the student with those from a teacher: by name, or the two."""
        sides = {key: self._side(wires) for key, wires in term.inputs.items()}
        students = [key for key, side in sides.items() if side == STUDENT]
        teachers = [key for key, side in sides.items() if side == TEACHER]
        named = [(key, key.replace(STUDENT, TEACHER)) for key in students]
        pairs = [(s, t) for s, t in named if t in teachers]
        if not pairs and len(students) == len(teachers):
            return list(zip(students, teachers, strict=True))
        return pairs

    def _side(self, wires: Wires) -> str | None:
        """Whether references lead to the student or to a teacher, through auxiliary modules too."""
        refs = [ref for _, ref in each_reference({"": wires})]
        owners = {self._side_of(ref.owner) for ref in refs}
        return STUDENT if STUDENT in owners else TEACHER if TEACHER in owners else None

    def _side_of(self, owner: str) -> str | None:
        owner = self.rows.get(owner, owner)
        if owner in self.models:
            return STUDENT if owner == STUDENT else TEACHER
        module = self.stage.auxiliary.get(owner)
        sides = [self._side(wires) for wires in module.inputs.values()] if module else []
        return STUDENT if STUDENT in sides else TEACHER if TEACHER in sides else None

    def _arguments(self, part: Wired, forward: Callable[..., Any]) -> dict[str, Source]:
        path = part.component.path
        wanted = wired_parameters(forward)
        open_ended = _takes_any(forward)
        sources: dict[str, Source] = {}
        unknown = [name for name in part.inputs if name not in wanted and not open_ended]
        for name, wires in part.inputs.items():
            if name in unknown:
                hint = did_you_mean(name, wanted) or f" (it takes: {', '.join(wanted)})"
                text = f"{part.component.type} takes no input '{name}'{hint}"
                self._fault((*path, "inputs", name), text)
            source = self._source(wires, (*path, "inputs", name))
            if source is not None:
                sources[name] = source
        for name, required in wanted.items():
            if name in part.inputs or self._is_told((*path, "inputs"), name, unknown):
                continue
            if name in DEFAULT_WIRED and (name in self.models or name == "targets"):
                sources[name] = Address(name, name)
            elif required and not self._is_teacher_lost(name):
                self._fault(path, self._unwired(part, name))
        return sources

    def _is_told(self, path: Path, name: str, unknown: list[str]) -> bool:
        """Whether an input is missing for a fault already told: it is misspelt or unreadable."""
        gaps = self.experiment.gaps
        return gaps.explain(path, name) or any(did_you_mean(other, [name]) for other in unknown)

    def _is_teacher_lost(self, name: str) -> bool:
        number = int(self.stage.path[1])
        return name == TEACHER and any(
            self.experiment.gaps.explain(("stages", n), key)
            for n in range(number + 1)
            for key in ("teacher", "teachers")
        )

    def _unwired(self, part: Wired, name: str) -> str:
        if isinstance(part, Auxiliary) and part.model is not None:
            return f"model '{part.model}' needs the input '{name}'; wire it: {{{name}: inputs}}"
        kind = part.component.type or "the module"
        if name == TEACHER and not self.stage.teachers:
            return f"{kind} needs a teacher, and stage '{self.stage.name}' has none"
        roles = list(self.stage.teachers)
        side = STUDENT
        if TEACHER in name:
            side = roles[0] if roles and TEACHER not in roles else TEACHER
        example = f"{side}.layer2" if "feature" in name else side
        if name == f"{TEACHER}s":  # a list of them
            example = f"[{', '.join(roles or [TEACHER])}]"
        example = name if name in BATCH_VALUES else example
        return f"{kind} needs the input '{name}'; wire it, e.g. inputs: {{{name}: {example}}}"

    def _source(self, wires: Wires, path: Path) -> Source | None:
        if isinstance(wires, Reference):
            return self._address(wires, path)
        several = [self._address(ref, (*path, n)) for n, ref in enumerate(wires)]
        found = tuple(address for address in several if address is not None)
        return found if len(found) == len(several) else None

    def _address(self, ref: Reference, path: Path) -> Address | None:
        keys = tuple(ref.path.split(".")) if ref.path else ()
        if ref.owner in self.models:
            return self._model_address(ref, path)
        if ref.owner in BATCH_VALUES:
            return Address(ref.text, ref.owner, keys)
        if ref.owner not in self.stage.auxiliary:
            return None  # already a fault of the file's frame
        if ref.tap:
            self._fault(path, f"'{ref.text}': name what feeds '{ref.owner}' itself instead")
        if ref.owner in self.placed:
            placed = self.placed[ref.owner]
            return Address(ref.text, placed.value, keys)
        return Address(ref.text, ref.owner, keys)

    def _model_address(self, ref: Reference, path: Path) -> Address | None:
        model, module_path, key = self._found(ref)
        module = find_module(model, module_path)
        if not ref.tap and _has_tensor(module, key):
            self._check_whole(f"'{ref.text}'", path)
            self.parameters[ref.text] = (module, key)
            return Address(ref.text, ref.text)
        if key and (ref.tap or not _may_have_part(module, key)):
            if ref.owner not in self.unknown:
                self._fault(path, f"'{ref.text}': {unknown_module(model, ref.path)}")
            return None
        behind = ref.keys or key
        keys = tuple(behind.split(".")) if behind else ()
        if not module_path and not ref.tap:
            return Address(ref.text, ref.owner, keys)
        run = self.models[ref.owner]
        run_path = module_path if model is run else _path_in(run, module)
        if run_path is None:
            self._fault(path, f"'{ref.text}' is no part of what 'redesign' makes of the model")
            return None
        captured = run_path + ref.tap
        self.captures.setdefault(ref.owner, []).append(captured)
        return Address(ref.text, value_name(ref.owner, captured), keys)

    def _found(self, ref: Reference) -> tuple[nn.Module, str, str]:
        """Return the model, the module's path and the key; a redesigned model's own paths last."""
        original, run = self.originals[ref.owner], self.models[ref.owner]
        path, key = split_path(original, ref.path)
        if ref.path and not path and run is not original:
            return (run, *split_path(run, ref.path))
        return (run if not ref.path else original), path, key

    def _fault(self, path: Path, message: str) -> None:
        self.faults.append(self.experiment.fault(path, message))


def _as_tuple(source: Source) -> tuple[Address, ...]:
    return (source,) if isinstance(source, Address) else source


def _path_in(model: nn.Module, module: nn.Module) -> str | None:
    return next((path for path, part in model.named_modules() if part is module), None)


def _has_tensor(module: nn.Module, name: str) -> bool:
    tensors: dict[str, Any] = {**module._parameters, **module._buffers}
    return tensors.get(name) is not None


def _forward_of(factory: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return the ``forward`` that what a class builds will have, if that is sure."""
    if not isinstance(factory, type) or inspect.getattr_static(factory, "__new__") is not NEW:
        return None
    forward = inspect.getattr_static(factory, "forward", None)
    is_own = inspect.isfunction(forward) and forward is not nn.Module.forward
    return forward if is_own else None


def _takes_any(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _may_have_part(module: nn.Module, key: str) -> bool:
    """Whether what follows a submodule's path may be a key of its output.

    Only a forward tells for sure; before one, a hint that it returns a tensor, or a submodule of
    nearly that name, means that the path is wrong.
    """
    try:
        returned = typing.get_type_hints(module.forward).get("return")
    except (NameError, TypeError, AttributeError):
        returned = None
    first = key.partition(".")[0]
    children = [name for name, _ in module.named_children()]
    is_number_of_row = "0" in children and first.lstrip("-").isdigit()
    is_wrong = is_number_of_row or bool(did_you_mean(first, children))
    return returned is not torch.Tensor and not is_wrong
