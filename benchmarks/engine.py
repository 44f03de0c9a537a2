"""The training loop of `distill run` on batches in memory, from an experiment as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

import distill
from distill import distributed
from distill.data.batch import Batch
from distill.data.loader import training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.registry import SINGULAR, Entry, Registry
from distill.training.build import Builder
from distill.training.loop import Loop
from distill.training.prepared import prepare
from distill.training.ready import make_ready
from distill.training.seed_run import SeedRun
from distill.training.stored_stage import with_stored

Train = Callable[[Iterable[Batch]], None]


def endlessly(train: Train, batches: list[Batch], steps: int) -> Callable[[], None]:
    """Return a function that trains a few steps each time, on batches that come around again."""
    endless = cycle(batches)
    return lambda: train(list(islice(endless, steps)))


def by_distill(
    described: Mapping[str, Any],
    folder: Path,
    stack: ExitStack,
    datasets: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    models: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Train:
    """Return a function that trains the only stage of an experiment on batches.

    Args:
        described: the experiment, as in a file.
        folder: for files on the way.
        stack: what holds for as long as the function is used.
        datasets: name -> factory, beside what is installed.
        models: likewise.
    """
    run = opened(described, folder, datasets, models)
    loop, _, _ = last_loop(run, stack)

    def train(batches: Iterable[Batch]) -> None:
        _train(loop, iter(batches))

    return train


def read_ahead(
    described: Mapping[str, Any],
    folder: Path,
    datasets: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> list[Batch]:
    """Return the batches of an epoch of an experiment's only stage, with their fingerprints."""
    run = opened(described, folder, datasets)
    (stage,) = run.builder.experiment.stages
    source = run.sources[stage.data.train]
    return list(training_batches(source, run.plan(stage), seed=0, epoch=0, fingerprints="inputs"))


def by_distill_stored(
    described: Mapping[str, Any],
    folder: Path,
    stack: ExitStack,
    batches: list[Batch],
    datasets: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Train:
    """Return the same for a stage that finds outputs of its teachers in a store, for each batch.

    The store is filled before, by an epoch over ``batches`` as ``read_ahead`` gives them.
    """
    run = opened(described, folder, datasets)
    run.builder.stores = folder / "stores"
    (stage,) = run.builder.experiment.stages
    ready = make_ready(run, prepare(run, stage, stack), stack)
    distiller = ready.spread.assembly.distiller
    assert distiller is not None
    assert distiller.stores, "the stage stores nothing"

    def train(chosen: Iterable[Batch]) -> None:
        _train(ready.loop, with_stored(iter(chosen), distiller.stores, 0))

    train(batches)
    filled = [out.find(batch) for out in distiller.stores.values() for batch in batches]
    assert all(found.missing is None for found in filled), "a row is still to be computed"
    return train


def epochs_by_distill(
    described: Mapping[str, Any], folder: Path, stack: ExitStack
) -> tuple[Callable[[], None], int]:
    """Return a function that trains the last stage of an experiment for an epoch, and its steps.

    Stages before it are put together, not trained. Batches are read once, ahead.
    """
    run = opened(described, folder)
    loop, source, plan = last_loop(run, stack)
    batches = list(training_batches(source, plan, seed=0, epoch=0))
    return lambda: _train(loop, iter(batches)), plan.steps


def last_loop(run: SeedRun, stack: ExitStack) -> tuple[Loop, Source, Plan]:
    """Return the loop of a run's last stage, and its data."""
    stages = run.builder.experiment.stages
    for stage in stages[:-1]:
        with ExitStack() as passing:
            prepare(run, stage, passing)
    ready = make_ready(run, prepare(run, stages[-1], stack), stack)
    return ready.loop, ready.source, ready.plan


def opened(
    described: Mapping[str, Any],
    folder: Path,
    datasets: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    models: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> SeedRun:
    """Return a run of an experiment, with data sets and models beside what is installed."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(dict(described)))
    experiment = distill.load(file)
    installed = distill.plugins()
    entries = [entry for kind in SINGULAR for entry in installed.entries(kind)]
    offered = {"datasets": datasets, "models": models}
    more = [
        Entry(kind, name, made, "benchmark")
        for kind, factories in offered.items()
        for name, made in factories.items()
    ]
    builder = Builder(experiment, Registry([*entries, *more], installed.records))
    device = distributed.device(experiment.device)
    built = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, 0, device, folder, lambda *_: None, built, sources)


def _train(loop: Loop, batches: Iterator[Batch]) -> None:
    loop.epoch(batches)
    if loop.device.type == "cuda":
        torch.cuda.synchronize(loop.device)
