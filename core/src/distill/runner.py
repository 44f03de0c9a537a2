"""Experiment -> stages in order -> results: the only place that knows the whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.config.controlled import stages_that_differ
from distill.config.experiment import Control, Experiment
from distill.control_runs import control_experiments
from distill.data.source import Source
from distill.environment import describe_environment
from distill.errors import ConfigError, DistillError, UsageError, did_you_mean
from distill.observer import ControlsEnd, Observer, Position, RunEnd, RunStart, StageResult
from distill.plugins import plugins
from distill.reference import STUDENT
from distill.registry import Registry
from distill.run_directory import GIVEN, RESOLVED, open_run, resolved_text, seed_directory
from distill.summary import READING, control_table, measured_on, summary_table
from distill.trained import Choice, find_stage, trained_model
from distill.training.around import special_module
from distill.training.build import STORES, Builder
from distill.training.check import check as find_faults
from distill.training.check import refusals
from distill.training.checkpoint import load_state
from distill.training.evaluation import SKIPPED
from distill.training.evaluation import evaluate as measure
from distill.training.measuring import evaluating
from distill.training.prepared import prepare
from distill.training.rehearsal import rehearse_measuring
from distill.training.reuse import Origin, can_be_taken
from distill.training.seed_run import SeedRun, Tell
from distill.training.stored_stage import may_stay_unloaded
from distill.training.trainer import train_stage
from distill.undrawn import Undrawn


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


def check(
    experiment: Experiment,
    registry: Registry | None = None,
    *,
    data: bool = False,
    allow_remote_code: bool = False,
) -> None:
    """Check components, parameters and references, all before anything expensive.

    Args:
        experiment: what ``load`` returns.
        registry: what ``plugins`` returns; by default everything installed.
        data: whether to open data sets and checkpoints too, and to run two samples through every
            stage.
        allow_remote_code: whether components may fetch code from elsewhere and run it. Without,
            they and what refers to them are not checked, and with ``data`` they are faults.

    Raises:
        ConfigError: with every fault of the file.
        DataError: if data is missing or does not fit a model.
    """
    registry = registry or plugins()
    if data:
        check_to_run(experiment, registry, allow_remote_code=allow_remote_code)
        builder = Builder(experiment, registry, allow_remote_code=allow_remote_code)
        device = chosen_device(experiment)
        rehearse_all(builder, open_sources(builder), device)
        return
    with Undrawn():
        faults = find_faults(experiment, registry, allow_remote_code=allow_remote_code)
    if faults:
        raise ConfigError(faults)


def check_to_run(
    experiment: Experiment,
    registry: Registry,
    *,
    allow_remote_code: bool,
    controls: Iterable[str] = (),
) -> dict[Control, Experiment]:
    """Check as ``check`` does; code from elsewhere that is not allowed is a fault too.

    Returns:
        The experiment with each control, as ``control_experiments`` does.

    Raises:
        ConfigError: with every fault of the file.
        UsageError: if there is no such control.
    """
    faults = find_faults(experiment, registry, allow_remote_code=allow_remote_code)
    if not allow_remote_code:
        faults += refusals(experiment, registry)
    if faults:
        raise ConfigError(faults)
    builder = Builder(experiment, registry, allow_remote_code=allow_remote_code)
    return control_experiments(builder, controls)


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
        states = _saved_states(experiment, directory)
        origin = None
        if not all(_is_complete(experiment, state) for state in states.values()):
            origin = _origin(experiment, compared_with) if compared_with else None
            sources = sources or open_sources(builder)
            for each in (builder, *controls.values()):
                rehearse_all(each, sources, device)
        with _observed(builder) as tell:
            tell("run_start", _run_start(builder, directory, device, states, origin))
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
        kept = can_be_taken(given, _states_on_disk(given, complete.directory), folders)
        stages = [name for name in kept if name not in differing]
    return Origin(folders, complete.stages, distributed.from_main(stages))


def evaluate(
    experiment: Experiment,
    registry: Registry,
    model: nn.Module,
    *,
    stage: str | None = None,
    dataset: str | None = None,
    allow_remote_code: bool = False,
) -> tuple[str, dict[str, float]]:
    """Measure a model on one of the experiment's data sets, by default the test data.

    Returns:
        The data set's name and the metrics by name.

    Raises:
        DistillError: if there is no such data set.
    """
    chosen = find_stage(experiment, stage)
    dataset = dataset or (
        experiment.test.dataset if experiment.test else next(iter(chosen.data.validate), None)
    )
    if dataset is None or dataset not in experiment.datasets:
        known = list(experiment.datasets)
        asked = f"there is no data set '{dataset}' in" if dataset else "name a data set of"
        hint = did_you_mean(dataset or "", known) or f" (there are: {', '.join(known)})"
        raise UsageError(f"{asked} {experiment.document.file}{hint}")
    builder = Builder(experiment, registry, allow_remote_code=allow_remote_code)
    device = chosen_device(experiment)
    seed = experiment.seeds[0]
    source = {dataset: builder.source(dataset)}
    run = SeedRun(builder, seed, device, Path(), _tell_nobody, {}, source)
    entries = experiment.test.metrics if experiment.test else chosen.metrics
    metrics = run.metrics(entries)
    if entries and not metrics:
        names = ", ".join(entry.name for entry in entries)
        raise UsageError(f"{names}: compared with a teacher, which is done during a run only")
    how = evaluating(run, chosen)
    model.to(device)
    specials = {STUDENT: special_module(builder, chosen.student, model)}
    return dataset, measure(model, source[dataset], metrics, how, specials=specials)


def chosen_device(experiment: Experiment) -> torch.device:
    """Return the device an experiment runs on.

    Raises:
        ConfigError: if it is not there.
    """
    try:
        return distributed.device(experiment.device)
    except DistillError as error:
        raise experiment.error(("device",), str(error)) from error


def open_sources(builder: Builder) -> dict[str, Source]:
    """Open the data sets that stages and test use."""
    experiment = builder.experiment
    used = [name for s in experiment.stages for name in (s.data.train, *s.data.validate)]
    used += [experiment.test.dataset] if experiment.test else []
    # The main process first, since a data set may be downloaded.
    if not distributed.is_main():
        distributed.barrier()
    sources = {name: builder.source(name) for name in dict.fromkeys(used)}
    if distributed.is_main():
        distributed.barrier()
    return sources


def rehearse_all(builder: Builder, sources: Mapping[str, Source], device: torch.device) -> None:
    """Run two samples through every stage, so that the last one fails now and not in a week."""
    seed = builder.experiment.seeds[0]
    run = begin(builder, seed, device, sources)
    experiment = builder.experiment
    for stage in experiment.stages:
        with ExitStack() as stack:
            assembly = prepare(run, stage, stack).assembly
            peers = list(stage.measured_peers)
            place = stage.places.get("data.validate", stage.path)
            roles = [role for role in (*assembly.roles, *peers) if role not in assembly.absent]
            entries = stage.metrics
            measured = [(name, roles, entries, place) for name in stage.data.validate]
            if experiment.test is not None:
                test = experiment.test
                place = (*test.path, "dataset")
                measured.append((test.dataset, [STUDENT, *peers], test.metrics, place))
            for name, roles, entries, place in measured:
                batch = run.first_measured(stage, sources[name], run.place(stage))
                metrics = run.metrics(entries, stage.teachers)
                rehearse_measuring(builder, assembly, sources[name], batch, roles, metrics, place)


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
    if _is_complete(builder.experiment, state):
        return _results(state)
    run = begin(builder, seed, device, sources, directory, tell)
    run.profiles = profiles
    first = 0
    if state is not None:
        first = state["stage"]
        run.results = _results(state)
        run.parts.resume_from(state["parts"])
        run.trained = set(state["models"])
        for name, weights in state["models"].items():
            run.models[name].load_state_dict(weights)
    for number in range(first, len(builder.experiment.stages)):
        resumed = state if state is not None and number == first and state["epoch"] else None
        if origin is not None and builder.experiment.stages[number].name in origin.stages:
            origin.take(run, number)
        else:
            train_stage(run, number, resumed)
    return run.results


def _tell_nobody(event: str, content: Any) -> None:
    """Drop an event: nobody watches a rehearsal."""


def begin(
    builder: Builder,
    seed: int,
    device: torch.device,
    sources: Mapping[str, Source],
    directory: Path = Path(),
    tell: Tell = _tell_nobody,
) -> SeedRun:
    """Begin a run; teachers that may turn out not to be needed are left out of memory."""
    stages = builder.experiment.stages
    used = dict.fromkeys(name for stage in stages for name in stage.models)
    unloaded = {name for name in used if may_stay_unloaded(builder, name)}
    models = {}
    for name in used:
        with torch.device("meta") if name in unloaded else nullcontext():
            models[name] = builder.model(name, seed)
    return SeedRun(builder, seed, device, directory, tell, models, dict(sources), unloaded=unloaded)


def _saved_states(experiment: Experiment, directory: Path) -> dict[int, Mapping[str, Any] | None]:
    """Return each seed's checkpoint, read by the main process for all."""
    states = _states_on_disk(experiment, directory) if distributed.is_main() else {}
    return distributed.from_main(states)  # type: ignore[no-any-return]


def _states_on_disk(experiment: Experiment, directory: Path) -> dict[int, Mapping[str, Any] | None]:
    states: dict[int, Mapping[str, Any] | None] = {}
    for seed in experiment.seeds:
        file = seed_directory(directory, experiment, seed) / "checkpoint.pt"
        states[seed] = load_state(file) if file.exists() else None
    return states


def _is_complete(experiment: Experiment, state: Mapping[str, Any] | None) -> bool:
    return state is not None and state["stage"] == len(experiment.stages)


def _results(state: Mapping[str, Any] | None) -> list[StageResult]:
    return [StageResult(**result) for result in state["results"]] if state else []


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
) -> RunStart:
    experiment = builder.experiment
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
    )
