"""A trained model measured on one of an experiment's data sets."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from distill.beginning import chosen_device, tell_nobody
from distill.config.experiment import Experiment
from distill.errors import UsageError, did_you_mean
from distill.reference import STUDENT
from distill.registry import Registry
from distill.trained import find_stage
from distill.training.around import special_module
from distill.training.build import Builder
from distill.training.evaluation import evaluate as measure
from distill.training.measuring import evaluating
from distill.training.seed_run import SeedRun


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
    run = SeedRun(builder, seed, device, Path(), tell_nobody, {}, source)
    entries = experiment.test.metrics if experiment.test else chosen.metrics
    metrics = run.metrics(entries)
    if entries and not metrics:
        names = ", ".join(entry.name for entry in entries)
        raise UsageError(f"{names}: compared with a teacher, which is done during a run only")
    how = evaluating(run, chosen)
    model.to(device)
    specials = {STUDENT: special_module(builder, chosen.student, model)}
    return dataset, measure(model, source[dataset], metrics, how, specials=specials)
