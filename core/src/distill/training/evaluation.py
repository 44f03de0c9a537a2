"""A model's metrics on a data set, every sample counted once on however many processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distill.data.batch import Batch
from distill.data.loader import Source, evaluation_batches
from distill.training.metrics import Metric, merge_over_ranks


def evaluate(
    model: nn.Module,
    source: Source,
    metrics: Mapping[str, Metric],
    *,
    batch_size: int,
    device: torch.device,
    seed: int = 0,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Return each metric's value by name; the model is in eval mode meanwhile.

    Args:
        model: called with ``batch.inputs``.
        source: the data.
        metrics: by name; reset first.
        batch_size: over all processes.
        device: where the model is.
        seed: of transforms that draw.
        workers: loader processes.
        autocast: reduced precision to run in.
    """
    for metric in metrics.values():
        metric.reset()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    batches = evaluation_batches(
        source, batch_size, seed=seed, workers=workers, pin_memory=device.type == "cuda"
    )
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            for batch in batches:
                _update(model, batch.to(device, non_blocking=True), metrics)
    finally:
        for module, mode in modes.items():
            module.training = mode
    for metric in metrics.values():
        merge_over_ranks(metric)
    # Plain numbers: a checkpoint with numpy's could not be loaded again.
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _update(model: nn.Module, batch: Batch, metrics: Mapping[str, Metric]) -> None:
    output = model(batch.inputs)
    for metric in metrics.values():
        metric.update(output, batch)
