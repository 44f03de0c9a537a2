"""A model's metrics on a data set, every sample counted once on however many processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from distill import distributed
from distill.data.loader import Loading, evaluation_batches
from distill.data.source import Source
from distill.errors import DataError
from distill.training.metrics import Metric, merge_over_ranks, takes_teachers, values_by_name
from distill.training.traceless import in_eval_mode


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
) -> dict[str, float]:
    """Return each metric's value by name; the models are in eval mode meanwhile.

    Args:
        model: called with ``batch.inputs``.
        source: the data.
        metrics: by name; reset first.
        how: batches, device, precision.
        teachers: by role, for metrics that compare with them; run only if there is one.

    Raises:
        DataError: if no sample can be read.
    """
    for metric in metrics.values():
        metric.reset()
        if hasattr(metric, "classes"):
            metric.classes = source.classes
    comparing = [metric for metric in metrics.values() if takes_teachers(metric)]
    plain = [metric for metric in metrics.values() if metric not in comparing]
    needed = teachers if teachers and comparing else {}
    batches = evaluation_batches(
        source, how.batch_size, how.loading, seed=how.seed, in_step=how.in_step
    )
    enabled = how.autocast is not None
    with (
        in_eval_mode([model, *needed.values()]),
        torch.no_grad(),
        torch.autocast(how.device.type, how.autocast, enabled=enabled),
    ):
        counted = 0
        for batch in batches:
            placed = batch.to(how.device, non_blocking=True, memory_format=how.memory_format)
            output = model(placed.inputs)
            outputs = {role: teacher(placed.inputs) for role, teacher in needed.items()}
            if not placed.share:  # run with the other processes, not counted
                continue
            counted += len(placed)
            for metric in plain:
                metric.update(output, placed)
            for metric in comparing:
                metric.update(output, placed, teachers=outputs)  # type: ignore[call-arg]
    if distributed.sum_over_ranks(torch.tensor([float(counted)]), how.device).item() == 0:
        raise DataError(f"data set '{source.name}': no sample can be read")
    for metric in metrics.values():
        merge_over_ranks(metric)
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        values.update(values_by_name(name, metric))
    return values
