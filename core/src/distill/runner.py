"""Experiment -> stages in order -> results: the only place that knows the whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.beginning import begin, chosen_device, open_sources
from distill.config.controlled import stages_that_differ
from distill.config.experiment import Control, Experiment
from distill.data.reading_notes import reading_notes
from distill.data.source import Source
from distill.environment import describe_environment
from distill.experiment_check import check_to_run, rehearse_all
from distill.observer import ControlsEnd, Observer, Position, RunEnd, RunStart, StageResult
from distill.plugins import plugins
from distill.registry import Registry
from distill.run_directory import GIVEN, RESOLVED, open_run, resolved_text, seed_directory
from distill.saved_states import is_complete, results_of, saved_states, states_on_disk
from distill.summary import READING, control_table, measured_on, summary_table
from distill.trained import Choice, trained_model
from distill.training.build import STORES, Builder
from distill.training.evaluation import SKIPPED
from distill.training.reuse import Origin, can_be_taken
from distill.training.seed_run import Tell
from distill.training.trainer import train_stage

UNPROFILED = (
    "there is nothing to profile, since this run is finished; -s name=NEW starts it anew, in a "
    "folder of its own"
)


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        stages: one result for each stage of each seed.
        table: the summary in Markdown.
        allow_remote_code: whether models may run code from elsewhere when they are built again.
        controls: what the run came to with a control in its teachers' place, by control.
        comparison: the controls' table in Markdown, empty without any.
    """

    experiment: Experiment
    registry: Registry
    directory: Path
    stages: Sequence[StageResult]
    table: str
    allow_remote_code: bool = False
    controls: Mapping[str, Result] = field(default_factory=dict)
    comparison: str = ""

    def student(
        self, stage: str | None = None, seed: int | None = None, weights: str | None = None
    ) -> nn.Module:
        """Return a trained student on the CPU: by default the last stage's, of the first seed."""
        choice = Choice("student", stage, seed, weights)
        return trained_model(
            self.experiment,
            self.registry,
            choice,
            self.directory,
            allow_remote_code=self.allow_remote_code,
        )[0]


def run(
    experiment: Experiment,
    *,
    registry: Registry | None = None,
    runs: str | os.PathLike[str] = "runs",
    allow_remote_code: bool = False,
    controls: Iterable[str] = (),
    profile: bool = False,
    stores: str | os.PathLike[str] = STORES,
) -> Result:
    """Run every stage for every seed, or what of it a stopped run has left to do.

    Args:
        experiment: what ``load`` returns.
        registry: what ``plugins`` returns; by default everything installed.
        runs: the folder in which the run's own folder ``<name>`` is made.
        allow_remote_code: whether components may fetch code from elsewhere and run it.
        controls: what to put in the teachers' place in further runs, in folders in the run's own.
        profile: whether to time every part of every step; on a GPU each part then waits for it.
        stores: the folder in which outputs of teachers are stored.

    Raises:
        DistillError: with a message for the user.
    """
    registry = registry or plugins()
    given = check_to_run(
        experiment, registry, controls=controls, allow_remote_code=allow_remote_code
    )
    build = partial(
        Builder, registry=registry, allow_remote_code=allow_remote_code, stores=Path(stores)
    )
    builder, others = build(experiment), {name: build(other) for name, other in given.items()}
    device = chosen_device(experiment)
    distributed.join(device)
    return _run(builder, Path(runs), device, {}, others, profiles=profile)


def _run(
    builder: Builder,
    runs: Path,
    device: torch.device,
    sources: dict[str, Source],
    controls: Mapping[Control, Builder] = MappingProxyType({}),
    compared_with: Result | None = None,
    *,
    profiles: bool = False,
) -> Result:
    """Run an experiment in its folder, and then with controls in folders in there.

    Args:
        builder: of the experiment.
        runs: the folder in which its own is made.
        device: where it runs.
        sources: opened data sets; if there are none, they are opened.
        controls: builders of the same experiment with controls, by control.
        compared_with: of what complete run this is the same with a control.
        profiles: whether to time every part of a step.
    """
    experiment = builder.experiment
    with open_run(runs, experiment) as directory:
        states = saved_states(experiment, directory)
        origin = None
        notes: list[str] = []
        if not all(is_complete(experiment, state) for state in states.values()):
            origin = _origin(experiment, compared_with) if compared_with else None
            if not sources:
                sources = open_sources(builder)
                notes += reading_notes(sources.values())
            for each in (builder, *controls.values()):
                rehearse_all(each, sources, device)
        with _observed(builder) as tell:
            start = _run_start(builder, directory, device, states, origin, notes, profiles=profiles)
            tell("run_start", start)
            results: list[StageResult] = []
            for seed in experiment.seeds:
                folder = seed_directory(directory, experiment, seed)
                state = states[seed]
                results += _run_seed(
                    builder, seed, device, folder, tell, sources, state, origin, profiles=profiles
                )
            table = summary_table(experiment, results, _no_fractions(builder))
            tell("run_end", RunEnd(results, table, measured_on(experiment)))
            distributed.barrier()  # what the main process has written is there for all others
            done = Result(
                experiment, builder.registry, directory, results, table, builder.allow_remote_code
            )
            return _with_controls(done, builder, controls, device, sources, tell, profiles=profiles)


def _with_controls(
    done: Result,
    builder: Builder,
    controls: Mapping[Control, Builder],
    device: torch.device,
    sources: dict[str, Source],
    tell: Tell,
    *,
    profiles: bool = False,
) -> Result:
    """Run a complete run again with each control, and compare."""
    if not controls:
        return done
    by_control: dict[str, Result] = {
        name: _run(other, done.directory, device, sources, compared_with=done, profiles=profiles)
        for name, other in controls.items()
    }
    table = control_table(
        done.experiment,
        done.stages,
        {name: (result.experiment, result.stages) for name, result in by_control.items()},
        _no_fractions(builder),
    )
    directories = {name: result.directory for name, result in by_control.items()}
    tell("controls_end", ControlsEnd(table, measured_on(done.experiment), READING, directories))
    distributed.barrier()
    return replace(done, controls=by_control, comparison=table)


def _origin(experiment: Experiment, complete: Result) -> Origin:
    """Return what a run with a control takes over from the run without."""
    seeds, given = experiment.seeds, complete.experiment
    folders = {seed: seed_directory(complete.directory, given, seed) for seed in seeds}
    stages: list[str] = []
    if distributed.is_main():
        differing = stages_that_differ(given, experiment)
        kept = can_be_taken(given, states_on_disk(given, complete.directory), folders)
        stages = [name for name in kept if name not in differing]
    return Origin(folders, complete.stages, distributed.from_main(stages))


def _run_seed(
    builder: Builder,
    seed: int,
    device: torch.device,
    directory: Path,
    tell: Tell,
    sources: dict[str, Source],
    state: Mapping[str, Any] | None,
    origin: Origin | None,
    *,
    profiles: bool = False,
) -> list[StageResult]:
    if is_complete(builder.experiment, state):
        return results_of(state)
    run = begin(builder, seed, device, sources, directory, tell)
    run.profiles = profiles
    first = 0
    if state is not None:
        first = state["stage"]
        run.results = results_of(state)
        run.parts.resume_from(state["parts"])
        run.trained = set(state["models"])
        for name, weights in state["models"].items():
            run.models[name].load_state_dict(weights)
    stages = builder.experiment.stages
    for number in range(first, len(stages)):
        run.let_go(stages[number:])
        resumed = state if state is not None and number == first and state["epoch"] else None
        if origin is not None and stages[number].name in origin.stages:
            origin.take(run, number)
        else:
            train_stage(run, number, resumed)
    return run.results


def _no_fractions(builder: Builder) -> set[str]:
    """Return the names of metrics that say of themselves that they are no fractions."""
    experiment = builder.experiment
    entries = [metric for stage in experiment.stages for metric in stage.metrics]
    entries += experiment.test.metrics if experiment.test else ()
    built = {entry.name: builder.component("metrics", entry.component) for entry in entries}
    counts = {name for name, metric in built.items() if not getattr(metric, "is_fraction", True)}
    return {*counts, SKIPPED}


@contextmanager
def _observed(builder: Builder) -> Iterator[Tell]:
    """Build the observers on the main process and close them whatever happens."""
    observers: list[Observer] = []
    if distributed.is_main():
        observers = builder.components("observers", builder.experiment.observers)

    def tell(event: str, content: Any) -> None:
        for observer in observers:
            getattr(observer, event)(content)

    try:
        yield tell
    finally:
        for observer in observers:
            observer.close()


def _run_start(
    builder: Builder,
    directory: Path,
    device: torch.device,
    states: Mapping[int, Mapping[str, Any] | None],
    origin: Origin | None,
    notes: Sequence[str],
    *,
    profiles: bool = False,
) -> RunStart:
    experiment = builder.experiment
    is_finished = all(is_complete(experiment, state) for state in states.values())
    return RunStart(
        name=experiment.name,
        directory=directory,
        seeds=experiment.seeds,
        stages=[stage.name for stage in experiment.stages],
        environment=describe_environment(builder.registry, device),
        files={GIVEN: experiment.document.text, RESOLVED: resolved_text(experiment)},
        resumed={
            seed: Position(seed, state["stage"], state["epoch"])
            for seed, state in states.items()
            if state is not None
        },
        taken=origin.stages if origin is not None else (),
        notes=[*notes, UNPROFILED] if profiles and is_finished else notes,
    )
