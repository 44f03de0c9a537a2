"""What there must be before a first stage: the device, the data sets, the models of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config.experiment import Experiment
from distill.data.source import Source
from distill.errors import DistillError
from distill.training.build import Builder
from distill.training.seed_run import SeedRun, Tell
from distill.training.stored_stage import may_stay_unloaded


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


def tell_nobody(event: str, content: Any) -> None:
    """Drop an event: nobody watches a rehearsal."""


def begin(
    builder: Builder,
    seed: int,
    device: torch.device,
    sources: Mapping[str, Source],
    directory: Path = Path(),
    tell: Tell = tell_nobody,
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
