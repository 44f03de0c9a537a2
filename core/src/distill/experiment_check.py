"""Everything that can be wrong with an experiment, told before it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from distill.beginning import begin, chosen_device, open_sources
from distill.config.experiment import Control, Experiment, Stage
from distill.control_runs import control_experiments
from distill.data.source import Source
from distill.errors import ConfigError
from distill.plugins import plugins
from distill.reference import STUDENT
from distill.registry import Registry
from distill.training.build import STORES, Builder
from distill.training.check import check as find_faults
from distill.training.check import refusals, refuse_faults
from distill.training.prepared import prepare
from distill.training.rehearsal import rehearse_measuring, rehearse_storing
from distill.training.seed_run import SeedRun


def check(
    experiment: Experiment,
    registry: Registry | None = None,
    *,
    data: bool = False,
    allow_remote_code: bool = False,
    stores: str | os.PathLike[str] = STORES,
) -> None:
    """Check components, parameters and references, all before anything expensive.

    Args:
        experiment: what ``load`` returns.
        registry: what ``plugins`` returns; by default everything installed.
        data: whether to open data sets and checkpoints too, and to run two samples through every
            stage.
        allow_remote_code: whether components may fetch code from elsewhere and run it. Without,
            they and what refers to them are not checked, and with ``data`` they are faults.
        stores: the folder in which outputs of teachers are stored, for ``data``.

    Raises:
        ConfigError: with every fault of the file.
        StorageError: if outputs are to be stored where nothing can be written.
        DataError: if data is missing or does not fit a model.
    """
    registry = registry or plugins()
    if data:
        check_to_run(experiment, registry, allow_remote_code=allow_remote_code)
        allowed = {"allow_remote_code": allow_remote_code}
        builder = Builder(experiment, registry, stores=Path(stores), **allowed)
        device = chosen_device(experiment)
        rehearse_all(builder, open_sources(builder), device)
        return
    refuse_faults(experiment, registry, allow_remote_code=allow_remote_code)


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


def rehearse_all(builder: Builder, sources: Mapping[str, Source], device: torch.device) -> None:
    """Run two samples through every stage, so that the last one fails now and not in a week."""
    run = begin(builder, builder.experiment.seeds[0], device, sources)
    stages = builder.experiment.stages
    for number, stage in enumerate(stages):
        run.let_go(stages[number:])
        with ExitStack() as stack:
            _rehearse(run, stage, stack)


def _rehearse(run: SeedRun, stage: Stage, stack: ExitStack) -> None:
    """Run two samples through a stage, into its new stores, and through all that measures."""
    builder = run.builder
    prepared = prepare(run, stage, stack)
    assembly = prepared.assembly
    rehearse_storing(builder, assembly, prepared.stores, prepared.batch)
    peers = list(stage.measured_peers)
    place = stage.places.get("data.validate", stage.path)
    roles = [role for role in (*assembly.roles, *peers) if role not in assembly.absent]
    measured = [(name, roles, stage.metrics, place) for name in stage.data.validate]
    test = builder.experiment.test
    if test is not None:
        place = (*test.path, "dataset")
        measured.append((test.dataset, [STUDENT, *peers], test.metrics, place))
    for name, roles, entries, place in measured:
        source = run.sources[name]
        batch = run.first_measured(stage, source, run.place(stage))
        metrics = run.metrics(entries, stage.teachers)
        rehearse_measuring(builder, assembly, source, batch, roles, metrics, place)
