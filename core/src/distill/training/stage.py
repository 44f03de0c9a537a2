"""A stage's description -> its Distiller: modules built or carried on, references wired."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from distill.config.experiment import RANDOM_TEACHER, Stage
from distill.errors import ConfigError, Fault
from distill.model.controls import OutputControl, output_control
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Call, value_name
from distill.reference import STUDENT
from distill.training import sharding
from distill.training.around import redesigned, special_module
from distill.training.build import Builder
from distill.training.parts import Maker, Parts, is_built
from distill.training.wires import Wiring

REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Assembly:
    """A stage put together.

    Attributes:
        roles: student and teachers by role, as they are outside of the stage.
        auxiliary: auxiliary modules by name, less those that are parts of models; peers of the
            student, which are models of the file, are among them.
        terms: loss modules by name.
        adapters: of terms, by the term's name.
        specials: what is put around models, by role.
        in_rows: auxiliary modules that a redesigned model calls itself.
        unasked: auxiliary modules that nothing comes from, by name; they do not run.
        frozen: parameters of student and auxiliary modules that stay as they are.
        left_out: parameters of the student that nothing in the stage comes from.
        absent: roles of teachers whose outputs are in a store, so that they are on the meta device.
        faults: what kept it from being put together; if there are any, ``distiller`` is ``None``.
    """

    stage: Stage
    roles: Mapping[str, nn.Module]
    parts: Parts
    auxiliary: dict[str, nn.Module] = field(default_factory=dict)
    terms: dict[str, nn.Module] = field(default_factory=dict)
    adapters: dict[str, nn.Module] = field(default_factory=dict)
    specials: dict[str, nn.Module] = field(default_factory=dict)
    in_rows: list[nn.Module] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)
    left_out: list[nn.Parameter] = field(default_factory=list)
    absent: frozenset[str] = frozenset()
    faults: list[Fault] = field(default_factory=list)
    distiller: Distiller | None = None

    def model(self, role: str) -> nn.Module:
        """Return the model in a role, or a peer of the student by its name."""
        return self.roles[role] if role in self.roles else self.auxiliary[role]

    def trained(self) -> dict[str, nn.Module]:
        """Return what the stage trains, by the names that the file selects parameters by."""
        terms = {f"criterion.{name}": term for name, term in self.terms.items()}
        adapters = {f"criterion.{name}.adapter": part for name, part in self.adapters.items()}
        return {STUDENT: self.roles[STUDENT], **self.auxiliary, **adapters, **terms}

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
    absent: Collection[str] = (),
) -> Assembly:
    """Wire a stage; modules that it inherits are taken from ``parts``, new ones are put there.

    Of teachers in the roles ``absent`` the models are there on the meta device, to be looked at.
    Where a model is missing the stage is not put together, and what else is wrong with it is found.
    """
    missing = {name for name in stage.models if name not in models}
    models = {**models, **{name: nn.Module() for name in missing}}
    roles = {role: models[entry.instance] for role, entry in stage.roles.items()}
    assembly = Assembly(stage, roles, parts, absent=frozenset(absent))
    faults = assembly.faults
    make = Maker(builder, stage, parts, seed, device, faults)
    assembly.auxiliary = make.auxiliary()
    assembly.terms = make.losses()
    run = dict(roles)
    lost = {role for role, entry in stage.roles.items() if entry.instance in missing}
    unknown = {*lost, *(name for name, model in stage.peers.items() if model in missing)}
    present = {role: entry for role, entry in stage.roles.items() if role not in lost}
    for role, entry in present.items():
        told = len(faults)
        run[role] = redesigned(builder, entry, roles[role], assembly.auxiliary, faults)
        if len(faults) > told:
            unknown.add(role)
    for role, entry in present.items():
        try:
            special = special_module(builder, entry, run[role])
        except ConfigError as error:
            faults.extend(error.faults)
            continue
        if special is not None:
            assembly.specials[role] = special
    peers = {name: models[model] for name, model in stage.peers.items()}
    originals = {**roles, **peers}
    wiring = Wiring(builder.experiment, stage, {**run, **peers}, originals, faults, unknown)
    wiring.place(assembly.auxiliary)
    assembly.in_rows = [assembly.auxiliary[name] for name in wiring.placed]
    assembly.auxiliary.update(peers)
    auxiliary = _auxiliary_calls(assembly, wiring, make)
    adapting, terms = _term_calls(assembly, wiring, make)
    auxiliary, assembly.unasked = _asked([*auxiliary, *adapting], terms, wiring)
    if not faults:
        faults.extend(_idle_controls(builder, stage, [*auxiliary, *terms]))
        faults.extend(_unfit_for_fast(builder, stage, wiring))
    if not faults and not missing:
        controls = {role: output_control(t.control, seed) for role, t in stage.teachers.items()}
        assembly.distiller = _distiller(assembly, wiring, auxiliary, terms, device, controls)
    return assembly


def _idle_controls(builder: Builder, stage: Stage, calls: list[Call]) -> Iterator[Fault]:
    """Yield a fault for each control of an output that nothing reads."""
    read = {address.value for call in calls for address in call.addresses()}
    for role, teacher in stage.teachers.items():
        if output_control(teacher.control, 0) is not None and role not in read:
            message = (
                f"{teacher.control} acts on what '{role}' gives at its end, which nothing in "
                f"stage '{stage.name}' reads; for its features there is {RANDOM_TEACHER}"
            )
            yield builder.experiment.fault((*teacher.path, "control"), message)


def _unfit_for_fast(builder: Builder, stage: Stage, wiring: Wiring) -> Iterator[Fault]:
    """Yield a fault for each teacher that is to be fast and cannot be."""
    for role, teacher in stage.teachers.items():
        if teacher.fast is None:
            continue
        place = (*teacher.path, "fast")
        if role in stage.compile:
            message = (
                f"'{role}' is in the stage's 'compile' too, which is for the plain model; write "
                "compile: true within 'fast' alone"
            )
            yield builder.experiment.fault(place, message)
        if stage.parallel == "fsdp":
            message = "parallel: fsdp shards the teacher as it is; use parallel: ddp, or no 'fast'"
            yield builder.experiment.fault(place, message)
        for name in (name for name, of in wiring.rows.items() if of == role):
            message = f"'{name}' stands in the teacher's row, which a copy of it must not have"
            yield builder.experiment.fault(place, message)


def _term_calls(assembly: Assembly, wiring: Wiring, make: Maker) -> tuple[list[Call], list[Call]]:
    """Return the calls of adapters, and those of terms."""
    adapting: list[Call] = []
    terms: list[Call] = []
    for name, term in assembly.stage.criterion.items():
        if name not in assembly.terms:
            wiring.check_unbuilt(term, make.factory("losses", term.component))
            continue
        call = wiring.call(name, term, assembly.terms[name])
        if term.adapter:
            assembly.adapters[name] = make.adapter(name)
            *before, call = wiring.adapted(name, term, call, assembly.adapters[name])
            adapting += before
        terms.append(call)
    return adapting, terms


def _distiller(
    assembly: Assembly,
    wiring: Wiring,
    auxiliary: list[Call],
    terms: list[Call],
    device: torch.device,
    controls: Mapping[str, OutputControl | None],
) -> Distiller:
    stage, models = assembly.stage, wiring.models
    weights = {name: term.weight for name, term in stage.criterion.items()}
    reduced = (device.type, REDUCED[stage.precision]) if stage.precision in REDUCED else None
    return Distiller(
        student=models[STUDENT],
        teachers={
            role: models[role] if role not in assembly.absent else None for role in stage.teachers
        },
        auxiliary=auxiliary,
        criterion=Criterion(terms, weights),
        captures=_captures_asked(wiring, [*auxiliary, *terms]),
        parameters=wiring.parameters,
        specials=assembly.specials,
        borrowed=[name for name, part in stage.auxiliary.items() if part.module is not None],
        whole=[role for role in stage.roles if why_whole(stage, role)],
        autocast=reduced,
        controls={role: control for role, control in controls.items() if control is not None},
    )


def why_whole(stage: Stage, role: str) -> str | None:
    """Return why a model is run in whole whatever is asked of it; ``None`` if it is not."""
    redesign = stage.roles[role].redesign
    if redesign is not None:
        return f"redesign: {redesign.type}"
    fast = stage.teachers[role].fast if role in stage.teachers else None
    if role in stage.compile or (fast is not None and fast.compile):
        return "it is compiled"
    return "parallel: fsdp gathers whole forwards" if sharding.is_sharded(stage) else None


def _auxiliary_calls(assembly: Assembly, wiring: Wiring, make: Maker) -> list[Call]:
    """Return the calls of auxiliary modules, less those that a redesigned model makes itself.

    Where it has not come to be, modules without inputs may be meant for it; and so may be one that
    could not be built.
    """
    calls = []
    for name, described in assembly.stage.auxiliary.items():
        module = assembly.auxiliary.get(name)
        if described.module is not None:
            module = wiring.module(described)
        is_fed = not wiring.unknown or bool(described.inputs)
        if name in wiring.unknown:
            wiring.check_unbuilt(described, None)
            continue
        if module is None and is_built(described) and described.inputs:
            wiring.check_unbuilt(described, make.factory("auxiliary_modules", described.component))
        if module is not None and is_fed and name not in wiring.placed:
            calls.append(wiring.call(name, described, module))
    return calls


def _asked(
    auxiliary: list[Call], terms: list[Call], wiring: Wiring
) -> tuple[list[Call], list[str]]:
    """Part auxiliary calls into those that a term needs and the names of the others."""
    needed = {address.value for call in terms for address in call.addresses()}
    kept: list[Call] = []
    for call in reversed(auxiliary):
        captured = (value_name(call.name, path) for path in wiring.captures.get(call.name, ()))
        if call.name in needed or not needed.isdisjoint(captured):
            kept.insert(0, call)
            needed |= {address.value for address in call.addresses()}
    return kept, [call.name for call in auxiliary if call not in kept]


def _captures_asked(wiring: Wiring, calls: list[Call]) -> dict[str, list[str]]:
    """Return role -> paths of what calls read from captures."""
    read = {address.value for call in calls for address in call.addresses()}
    return {
        role: [path for path in paths if value_name(role, path) in read]
        for role, paths in wiring.captures.items()
    }


@contextmanager
def roles_in_force(assembly: Assembly) -> Iterator[None]:
    """Put teachers in their mode and let them get no gradients; undo all of it afterwards.

    What else is frozen meanwhile is thawed too, and stores count as used no more.
    """
    modules = [*assembly.roles.values(), *assembly.trained().values()]
    before = {p: p.requires_grad for module in modules for p in module.parameters()}
    modes = {part: part.training for module in modules for part in module.modules()}
    for role, teacher in assembly.stage.teachers.items():
        assembly.roles[role].requires_grad_(False).train(teacher.mode == "train")
        if role in assembly.specials:
            assembly.specials[role].train(teacher.mode == "train")
    try:
        yield
    finally:
        for module in modules:
            for parameter in module.parameters():
                parameter.requires_grad_(before.get(parameter, True))
        for part, mode in modes.items():
            part.training = mode
        if assembly.distiller is not None:
            assembly.distiller.release()
            for outputs in assembly.distiller.stores.values():
                outputs.rows.release()
