"""What ``run --control`` runs beside an experiment: the same with controls as teachers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from distill.config.controlled import ALL, Place, with_control
from distill.config.experiment import CONTROLS, RANDOM_TEACHER, Control, Experiment
from distill.errors import UsageError, did_you_mean
from distill.training.build import Builder
from distill.training.check import META
from distill.training.parts import Parts
from distill.training.stage import assemble


def control_experiments(builder: Builder, controls: Iterable[str]) -> dict[Control, Experiment]:
    """Return the experiment once for each control, which stands in for every teacher it can.

    A control of outputs leaves a teacher alone of which a stage reads features only.

    Args:
        builder: of the experiment, which has been checked.
        controls: by name; ``all`` for those that change something.

    Raises:
        UsageError: if there is no such control.
        ConfigError: if there is nothing to control.
    """
    names = list(dict.fromkeys(controls))
    for name in names:
        if name not in (*CONTROLS, ALL):
            known = f" (there are: {', '.join(CONTROLS)}, {ALL})"
            raise UsageError(f"there is no control '{name}'{did_you_mean(name, CONTROLS) or known}")
    experiment = builder.experiment
    if not names:
        return {}
    teachers = {(stage.name, role) for stage in experiment.stages for role in stage.teachers}
    if not teachers:
        raise experiment.error(("stages",), "--control needs a teacher, and no stage has one")
    read = set(_outputs_read(builder))
    places = {name: teachers if name == RANDOM_TEACHER else read for name in CONTROLS}
    for name in CONTROLS:
        if name in names and not places[name]:
            message = (
                f"--control {name} acts on what a teacher gives at its end, which no stage reads; "
                f"for features there is {RANDOM_TEACHER}"
            )
            raise experiment.error(("stages",), message)
    asked = [c for c in CONTROLS if c in names or (ALL in names and places[c])]
    return {control: with_control(experiment, control, places[control]) for control in asked}


def _outputs_read(builder: Builder) -> Iterator[Place]:
    """Yield the teachers whose output, or a part of it, a stage reads."""
    experiment, parts = builder.experiment, Parts()
    used = dict.fromkeys(name for stage in experiment.stages for name in stage.models)
    with META:
        models: dict[str, nn.Module] = {name: builder.model(name, 0) for name in used}
        for stage in experiment.stages:
            distiller = assemble(builder, stage, models, parts, 0, META).distiller
            if distiller is None:
                continue
            distiller.release()
            for role in stage.teachers:
                if distiller.parts_asked(role) != []:
                    yield stage.name, role
