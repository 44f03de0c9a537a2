"""What a person should know about a stage before it trains: what is cut, frozen, adapted."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distill import distributed
from distill.config.experiment import Scheduler, Unit
from distill.data.plan import Plan
from distill.model.adapter import Adapter
from distill.model.distiller import Distiller
from distill.reference import STUDENT
from distill.training.note import counted
from distill.training.rehearsal import Rehearsal
from distill.training.stage import Assembly, why_whole
from distill.training.stage_events import count_parameters
from distill.weight_schedule import WeightSchedule


def stage_notes(assembly: Assembly, plan: Plan, rehearsal: Rehearsal) -> list[str]:
    """Return one line for each."""
    return [
        *(f"{name} is overwritten by the model, so it is copied" for name in rehearsal.copied),
        *_controls(assembly),
        *_extents(assembly, rehearsal),
        *(f"{name} does not run: nothing is asked of it" for name in assembly.unasked),
        *_maximised(assembly, plan),
        *_begun_anew(assembly),
        *_adapters(assembly),
        *_frozen(assembly),
        *_data(assembly, plan),
        *_schedulers(assembly, plan),
        *_processes(assembly),
    ]


CONTROLLED = {
    "label_smoothing": "the labels, smoothed as much as it doubts them, stand in for its outputs",
    "random_teacher": "it has weights as they are drawn, not those of '{model}'",
    "shuffled_classes": "its outputs are given to other classes",
}


def _controls(assembly: Assembly) -> Iterator[str]:
    for role, teacher in assembly.stage.teachers.items():
        if teacher.control is not None:
            yield f"{role} is a control: {CONTROLLED[teacher.control].format(model=teacher.model)}"


def _extents(assembly: Assembly, rehearsal: Rehearsal) -> Iterator[str]:
    """Tell how much of each model runs, where anything but its output is asked of it."""
    distiller = assembly.distiller
    assert distiller is not None
    for role, extent in distiller.extents.items():
        captured = role in distiller.captures
        if role in assembly.absent:
            continue  # of which is told what is stored
        if extent == "nothing":
            yield f"{role} does not run: nothing is asked of it"
        elif role in distiller.uncut:
            yield f"{role} is not cut: {distiller.uncut[role]}"
        elif extent == "part":
            total = count_parameters(assembly.roles[role])
            asked = ", ".join(distiller.captures[role].paths)
            yield (
                f"{role} stops behind what is asked of it ({asked}): {rehearsal.ran[role]:,} of "
                f"{total:,} parameters run"
            )
        elif why_whole(assembly.stage, role) is not None and _could_be_cut(distiller, role):
            yield f"{role} is not cut: {why_whole(assembly.stage, role)}"
        elif captured:
            yield f"{role} runs whole: its output is asked for"
        if distiller.branches.get(role):
            names = ", ".join(distiller.branches[role])
            yield f"{role} runs without {names}: what they give is not asked for"
        if role in distiller.untraced:
            yield f"{role} runs its side branches, if it has any: {distiller.untraced[role]}"


def _could_be_cut(distiller: Distiller, role: str) -> bool:
    return role in distiller.captures or distiller.parts_asked(role) is not None


def _adapters(assembly: Assembly) -> Iterator[str]:
    for name, adapter in assembly.adapters.items():
        assert isinstance(adapter, Adapter)
        chosen = "; ".join(adapter.chosen)
        size = counted(count_parameters(adapter), "parameter")
        yield f"the adapter of '{name}': {chosen} ({size})"


def _maximised(assembly: Assembly, plan: Plan) -> Iterator[str]:
    epochs = assembly.stage.epochs
    for name, term in assembly.stage.criterion.items():
        lowest = term.weight
        if isinstance(lowest, WeightSchedule):
            lowest = lowest.lowest(epochs if lowest.unit == "epochs" else epochs * plan.steps)
        if lowest < 0:
            yield f"'{name}' is made larger where its weight is negative (down to {lowest:g})"


def _begun_anew(assembly: Assembly) -> Iterator[str]:
    """Tell of trained losses and adapters that a stage before has under the same name."""
    parts = assembly.parts.modules
    for kind, modules in (("losses", assembly.terms), ("adapters", assembly.adapters)):
        for name, module in modules.items():
            others = [m for key, m in parts.items() if key[0] == kind and key[2] == name]
            before = others[: others.index(module)] if module in others else []
            if count_parameters(module) and any(map(count_parameters, before)):
                what = "the adapter of" if kind == "adapters" else "the parameters of"
                yield f"{what} '{name}' begin anew, since the stage writes its own criterion"


def _frozen(assembly: Assembly) -> Iterator[str]:
    if assembly.frozen:
        frozen = {parameter: parameter.numel() for parameter in assembly.frozen}
        count = sum(frozen.values())
        yield f"{counted(count, 'parameter')} {_are(count)} frozen"
    assert assembly.distiller is not None
    if assembly.left_out and assembly.distiller.extents[STUDENT] != "nothing":
        count = sum(p.numel() for p in assembly.left_out)
        yield (
            f"{counted(count, 'parameter')} of the student {_are(count)} left out: no loss reaches "
            f"{'it' if count == 1 else 'them'}"
        )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _data(assembly: Assembly, plan: Plan) -> Iterator[str]:
    data = assembly.stage.data
    if data.accumulate > 1:
        samples = data.accumulate * data.batch_size
        yield f"a step is {data.accumulate} batches, {samples:,} samples"
    if plan.batch_sampler is None and plan.samples % plan.batch_size == 1 and not plan.drop_last:
        yield "the last batch of an epoch is a single sample; data.drop_last leaves it out"


def _schedulers(assembly: Assembly, plan: Plan) -> Iterator[str]:
    stage = assembly.stage
    steps_in: dict[Unit, int] = {"epochs": plan.steps, "steps": 1}
    length = stage.epochs * plan.steps
    began = 0
    for entry in stage.schedulers:
        each = steps_in[entry.unit]
        if entry.until is not None and entry.until * each >= length:
            yield (
                f"{entry.component.type} goes on to the end, which comes before its until: "
                f"{entry.until}"
            )
            return  # what comes behind it never acts
        if entry.component.type == "CosineAnnealingLR":
            end = length if entry.until is None else entry.until * each
            yield from _cosine(entry, math.ceil((end - began) / each))
        began = 0 if entry.until is None else entry.until * each


def _cosine(entry: Scheduler, length: int) -> Iterator[str]:
    """Tell of a cosine that has another length than its part of the stage."""
    lowest = entry.component.params["T_max"]
    reached = f"CosineAnnealingLR has its lowest rate after T_max: {lowest:,} {entry.unit}"
    if lowest > length:
        yield f"{reached}, and acts for {length:,}"
    elif lowest < length - 1:
        yield f"{reached}, and rises again: it acts for {length:,}"


def _processes(assembly: Assembly) -> Iterator[str]:
    if assembly.stage.parallel == "fsdp" and distributed.world_size() == 1:
        yield "parallel: fsdp has nothing to share out in a single process"
