"""Stages whose outcome a run takes from another one that is complete, in place of training them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill import distributed
from distill.config.experiment import Experiment, Stage
from distill.errors import StorageError
from distill.observer import StageResult
from distill.training.checkpoint import load_weights, write_atomically
from distill.training.seed_run import SeedRun


@dataclass(frozen=True)
class Origin:
    """A complete run, and the stages that another run takes from it.

    Attributes:
        directories: of the run, by seed.
        results: of all its stages.
        stages: names of those to take.
    """

    directories: Mapping[int, Path]
    results: Sequence[StageResult]
    stages: Sequence[str]

    def take(self, run: SeedRun, number: int) -> None:
        """Let a run go on behind a stage as though it had trained it.

        Raises:
            StorageError: if the weights cannot be read or copied.
        """
        stage = run.builder.experiment.stages[number]
        model = run.models[stage.student.model]
        if distributed.is_main():  # whose disk the others may not see
            given, own = self.directories[run.seed] / stage.name, run.directory / stage.name
            for file in sorted(given.glob("*.safetensors")):
                write_atomically(own / file.name, partial(shutil.copyfile, file))
            try:
                load_weights(model, _kept(own, stage))
            except ValueError as error:
                raise StorageError(f"stage '{stage.name}' cannot be taken over: {error}") from error
        weights = {key: value.cpu() for key, value in model.state_dict().items()}
        model.load_state_dict(distributed.from_main(weights))
        run.trained.add(stage.student.model)
        run.results += [r for r in self.results if (r.seed, r.stage) == (run.seed, stage.name)]
        run.save(number + 1, 0, {})


def can_be_taken(
    experiment: Experiment,
    states: Mapping[int, Mapping[str, Any] | None],
    directories: Mapping[int, Path],
) -> list[str]:
    """Return the names of the stages of which a complete run has kept all that they changed.

    Not so those that train, beside a student, modules, losses or models, or a teacher's statistics.

    Args:
        experiment: the description.
        states: the run's checkpoints by seed.
        directories: of the run, by seed.
    """
    return [
        stage.name
        for stage in experiment.stages
        if not stage.peers
        and all(teacher.mode == "eval" for teacher in stage.teachers.values())
        and all(not _learned(stage, state) for state in states.values() if state is not None)
        and all(_kept(folder / stage.name, stage).is_file() for folder in directories.values())
    ]


def _learned(stage: Stage, state: Mapping[str, Any]) -> bool:
    """Whether some module or loss of a stage has parameters or buffers."""
    origin = stage.origins.get("criterion", stage.name)
    kinds = ("losses", "adapters")
    keys = [f"{kind}|{origin}|{name}" for kind in kinds for name in stage.criterion]
    keys += [f"auxiliary_modules|{'|'.join(part.origin)}" for part in stage.auxiliary.values()]
    return any(state["parts"].get(key) for key in keys)


def _kept(folder: Path, stage: Stage) -> Path:
    """Return the file of the weights with which a stage's student went on."""
    kept = folder / f"{stage.keep}.safetensors"
    return kept if kept.is_file() else folder / "last.safetensors"
