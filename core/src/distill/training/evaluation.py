"""A model's metrics on a data set, every sample counted once on however many processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.data.batch import Batch
from distill.data.loader import Loading, evaluation_batches
from distill.data.source import Source
from distill.errors import DataError
from distill.model.distiller import call_model
from distill.reference import STUDENT
from distill.training.metrics import Metric, merge_over_ranks, takes_teachers, values_by_name
from distill.training.traceless import in_eval_mode

SKIPPED = "skipped"


@dataclass(frozen=True)
class Evaluating:
    """How models are run for their metrics.

    Attributes:
        batch_size: over all processes.
        device: where the models are.
        seed: of transforms that draw.
        autocast: reduced precision to run in.
        memory_format: of images.
        in_step: whether all processes must run the same number of batches.
    """

    batch_size: int
    device: torch.device
    seed: int = 0
    loading: Loading = field(default_factory=Loading)
    autocast: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    in_step: bool = False


def evaluate(
    model: nn.Module,
    source: Source,
    metrics: Mapping[str, Metric],
    how: Evaluating,
    teachers: Mapping[str, nn.Module] | None = None,
    specials: Mapping[str, nn.Module | None] | None = None,
) -> dict[str, float]:
    """Return each metric's value by name; the models are in eval mode meanwhile.

    Where samples could not be read and are skipped, ``skipped`` is their number.

    Args:
        model: called with ``batch.inputs``, unless there is a special module around it.
        source: the data.
        metrics: by name; reset first.
        how: batches, device, precision.
        teachers: by role, for metrics that compare with them.
        specials: by role, called with the batch in the model's place if there is one.

    Raises:
        DataError: if no sample can be read.
    """
    for metric in metrics.values():
        metric.reset()
        if hasattr(metric, "classes"):
            metric.classes = source.classes
    models = {STUDENT: model, **(teachers or {})}
    around = dict(specials or {})
    calls = {role: partial(call_model, one, around.get(role)) for role, one in models.items()}
    with (
        in_eval_mode([*models.values(), *filter(None, around.values())]),
        torch.no_grad(),
        torch.autocast(how.device.type, how.autocast, enabled=how.autocast is not None),
    ):
        counted, skipped = _run(calls, source, list(metrics.values()), how)
    seen = distributed.sum_over_ranks(torch.tensor([counted, skipped]), how.device)
    if seen[0] == 0:
        raise DataError(f"data set '{source.name}': no sample can be read")
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        merge_over_ranks(metric)
        values.update(values_by_name(name, metric))
    return {**values, SKIPPED: float(seen[1])} if seen[1] else values


def _run(
    models: Mapping[str, Callable[[Batch], Any]],
    source: Source,
    metrics: Sequence[Metric],
    how: Evaluating,
) -> tuple[int, int]:
    """Show metrics this process's samples; return how many they were and how many are unreadable.

    Teachers are run only if a metric compares with them.
    """
    comparing = [metric for metric in metrics if takes_teachers(metric)]
    plain = [metric for metric in metrics if metric not in comparing]
    needed = models if comparing else {STUDENT: models[STUDENT]}
    counted = skipped = 0
    for batch in evaluation_batches(
        source, how.batch_size, how.loading, seed=how.seed, in_step=how.in_step
    ):
        skipped += len(batch.skipped)
        if len(batch) == 0:
            continue
        placed = batch.to(how.device, non_blocking=True, memory_format=how.memory_format)
        outputs = {role: model(placed) for role, model in needed.items()}
        if not placed.share:  # run with the other processes, not counted
            continue
        counted += len(placed)
        output = outputs.pop(STUDENT)
        for metric in plain:
            metric.update(output, placed)
        for metric in comparing:
            metric.update(output, placed, teachers=outputs)  # type: ignore[call-arg]
    return counted, skipped
