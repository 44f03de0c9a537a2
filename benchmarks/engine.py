"""The training loop of `distill run` on batches in memory, from an experiment as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

import distill
from distill import distributed
from distill.data.batch import Batch
from distill.registry import SINGULAR, Entry, Registry
from distill.training.build import Builder
from distill.training.loop import Loop
from distill.training.optimizer import build_optimization
from distill.training.prepared import prepare
from distill.training.seed_run import SeedRun

Train = Callable[[list[Batch]], None]


def by_distill(
    described: Mapping[str, Any],
    folder: Path,
    stack: ExitStack,
    datasets: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Train:
    """Return a function that trains the only stage of an experiment on batches.

    Args:
        described: the experiment, as in a file.
        folder: for files on the way.
        stack: what holds for as long as the function is used.
        datasets: name -> factory, beside what is installed.
    """
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(dict(described)))
    experiment = distill.load(file)
    installed = distill.plugins()
    entries = [entry for kind in SINGULAR for entry in installed.entries(kind)]
    more = [Entry("datasets", name, made, "benchmark") for name, made in datasets.items()]
    builder = Builder(experiment, Registry([*entries, *more], installed.records))
    device = distributed.device(experiment.device)
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    run = SeedRun(builder, 0, device, folder, lambda *_: None, models, sources)
    (stage,) = experiment.stages
    assembly = prepare(run, stage, stack).assembly
    assert assembly.distiller is not None
    optimization = build_optimization(builder, stage, assembly.trained(), device)
    loop = Loop(assembly.distiller, optimization, device, seed=0, stage=stage.name)

    def train(batches: list[Batch]) -> None:
        loop.epoch(iter(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return train
