"""An experiment with a control in its teachers' place, and what of it that leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

from distill.config.experiment import Control, Experiment, Stage

ALL = "all"
"""The word for every control that changes something."""

Place = tuple[str, str]
"""A stage's name and a teacher's role there."""


def with_control(experiment: Experiment, control: Control, places: Collection[Place]) -> Experiment:
    """Return the experiment with a control in some teachers' place, ``resolved`` included.

    It is called ``control.<control>``, as no stage can be: its folder lies in that of the run.
    """
    stages = []
    for stage in experiment.stages:
        given = stage.teachers.items()
        acted_on = {r: replace(t, control=control) for r, t in given if (stage.name, r) in places}
        stages.append(replace(stage, teachers={**stage.teachers, **acted_on}))
    # One by one, since stages share what they inherit.
    plain = [copy.deepcopy(stage) for stage in experiment.resolved["stages"]]
    for stage_name, role in places:
        described = next(stage for stage in plain if stage["name"] == stage_name)
        described["teachers"][role]["control"] = control
    name = f"control.{control}"
    resolved = {**experiment.resolved, "name": name, "stages": plain}
    return replace(experiment, name=name, stages=tuple(stages), resolved=resolved)


def stages_that_differ(experiment: Experiment, controlled: Experiment) -> list[str]:
    """Return the names of the stages that a control acts on, or that go on with their outcome.

    All others give the same in both, since a stage's draws depend on the seed and its name alone.
    """
    models: set[str] = set()
    names: list[str] = []
    for stage, other in zip(experiment.stages, controlled.stages, strict=True):
        follows = models.intersection(stage.models) or _origins(stage).intersection(names)
        if follows or stage.teachers != other.teachers:
            names.append(stage.name)
            models.update(stage.trains)
            models.update(t.model for t in stage.teachers.values() if t.mode == "train")
    return names


def _origins(stage: Stage) -> set[str]:
    """Return the stages whose losses and auxiliary modules the stage goes on with, or its name."""
    modules = {module.origin[0] for module in stage.auxiliary.values()}
    return {stage.origins.get("criterion", stage.name), *modules}
