"""Means of losses while training, and the metrics of an evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from distill import distributed
from distill.data.batch import Batch


class Metric(Protocol):
    """Measures a model's outputs; exact however many processes share the data.

    It may have more attributes: ``higher_is_better`` and ``is_fraction`` (shown in percent), both
    ``True`` unless given; ``teacher``, the role of a teacher that it compares with;
    ``classes_needed``, how many there have to be; and ``classes``, which is set to the data set's
    class names before it is used.
    """

    def reset(self) -> None:
        """Forget everything."""

    def update(self, output: Any, batch: Batch) -> None:
        """Take in the model's output for a batch.

        With a third parameter ``teachers`` it is given the teachers' outputs by role too.
        """

    def state(self) -> Any:
        """Return what this process has seen, as tensors and plain data."""

    def merge(self, state: Any) -> None:
        """Add what another process has seen."""

    def compute(self) -> float | Mapping[str, float]:
        """Return the value over everything seen, or several by name.

        Of several, ``mean`` is reported under the metric's own name, others as ``<name>/<part>``.
        """


def merge_over_ranks(metric: Metric) -> None:
    """Let ``metric`` have seen what it has seen in any process, in the order of ranks."""
    if distributed.world_size() == 1:
        return
    states = distributed.gather_objects(metric.state())
    metric.reset()
    for state in states:
        metric.merge(state)


def is_higher_better(metric: Metric) -> bool:
    """Return in which direction a metric is better."""
    return bool(getattr(metric, "higher_is_better", True))


def compares_with(metric: Metric) -> str | None:
    """Return the role of the teacher that a metric compares with."""
    return getattr(metric, "teacher", None)


def takes_teachers(metric: Metric) -> bool:
    """Whether a metric wants the teachers' outputs."""
    return "teachers" in inspect.signature(metric.update).parameters


def values_by_name(name: str, metric: Metric) -> dict[str, float]:
    """Return a metric's value under its name, or its several under theirs."""
    value = metric.compute()
    # Plain numbers: a checkpoint with numpy's could not be loaded again.
    if isinstance(value, Mapping):
        return {
            name if part == "mean" else f"{name}/{part}": float(number)
            for part, number in value.items()
        }
    return {name: float(value)}


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
