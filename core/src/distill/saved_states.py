"""How far each seed of a run has come, as its checkpoints say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill import distributed
from distill.config.experiment import Experiment
from distill.observer import StageResult
from distill.run_directory import seed_directory
from distill.training.checkpoint import load_state


def saved_states(experiment: Experiment, directory: Path) -> dict[int, Mapping[str, Any] | None]:
    """Return each seed's checkpoint, read by the main process for all."""
    states = states_on_disk(experiment, directory) if distributed.is_main() else {}
    return distributed.from_main(states)  # type: ignore[no-any-return]


def states_on_disk(experiment: Experiment, directory: Path) -> dict[int, Mapping[str, Any] | None]:
    """Return each seed's checkpoint, ``None`` for one that has none."""
    states: dict[int, Mapping[str, Any] | None] = {}
    for seed in experiment.seeds:
        file = seed_directory(directory, experiment, seed) / "checkpoint.pt"
        states[seed] = load_state(file) if file.exists() else None
    return states


def is_complete(experiment: Experiment, state: Mapping[str, Any] | None) -> bool:
    """Whether a seed has gone through all stages."""
    return state is not None and state["stage"] == len(experiment.stages)


def results_of(state: Mapping[str, Any] | None) -> list[StageResult]:
    """Return what the stages came to that a seed has behind it."""
    return [StageResult(**result) for result in state["results"]] if state else []
