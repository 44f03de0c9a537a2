"""Means of losses while training, and the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from distill import distributed
from distill.data.batch import Batch


class Metric(Protocol):
    """Measures a model's outputs; exact however many processes share the data."""

    def reset(self) -> None:
        """Forget everything."""

    def update(self, output: Any, batch: Batch) -> None:
        """Take in the model's output for a batch."""

    def state(self) -> Any:
        """Return what this process has seen, as tensors and plain data."""

    def merge(self, state: Any) -> None:
        """Add what another process has seen."""

    def compute(self) -> float:
        """Return the value over everything seen."""


def merge_over_ranks(metric: Metric) -> None:
    """Let ``metric`` have seen what it has seen in any process, in the order of ranks."""
    if distributed.world_size() == 1:
        return
    states = distributed.gather_objects(metric.state())
    metric.reset()
    for state in states:
        metric.merge(state)


class Meter:
    """Means of named losses, weighted by samples; values stay on the device until they are read."""

    def __init__(self) -> None:
        self._losses: list[tuple[Mapping[str, torch.Tensor], float]] = []

    def add(self, losses: Mapping[str, torch.Tensor], weight: float) -> None:
        """Take in a step's losses without waiting for them."""
        self._losses.append(({name: loss.detach() for name, loss in losses.items()}, weight))

    def read(self) -> tuple[dict[str, float], float]:
        """Return the means over all processes since the last reading, and their weight."""
        if not self._losses:
            return {}, 0.0
        names = list(self._losses[0][0])
        rows = torch.stack([step[name] for step, _ in self._losses for name in names])
        rows = rows.view(len(self._losses), len(names))
        weights = torch.tensor([w for _, w in self._losses], dtype=torch.float64)
        self._losses = []
        sums = (rows.cpu().double() * weights.unsqueeze(1)).sum(0)
        sums = distributed.sum_over_ranks(torch.cat([sums, weights.sum().view(1)]), rows.device)
        *totals, weight = sums.tolist()
        return dict(zip(names, (t / weight for t in totals), strict=True)), weight
