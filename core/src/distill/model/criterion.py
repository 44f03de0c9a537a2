"""Weighted terms -> named losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from distill.model.wiring import Call, Timer, Values
from distill.weight_schedule import WeightSchedule

TOTAL = "total"


class Criterion(nn.Module):
    """The weighted sum of named terms.

    Args:
        terms: the losses and where their arguments come from.
        weights: name -> factor in the total, or its schedule.

    Attributes:
        calls: the terms.
        weights: name -> the factor now.
        is_scheduled: whether some weight changes over the stage.
        timer: what the terms are called through while they are timed.
    """

    timer: Timer | None = None

    def __init__(self, terms: Sequence[Call], weights: Mapping[str, float | WeightSchedule]):
        super().__init__()
        self.modules_of_terms = nn.ModuleList(term.module for term in terms)
        self.calls = tuple(terms)
        self._schedules = {n: w for n, w in weights.items() if isinstance(w, WeightSchedule)}
        self.weights = {n: w for n, w in weights.items() if not isinstance(w, WeightSchedule)}
        self.is_scheduled = bool(self._schedules)
        self.set_position(0, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Weigh the terms as in an epoch and step of the stage, both counted from 0."""
        for name, schedule in self._schedules.items():
            self.weights[name] = schedule.at(epoch, step)

    def forward(self, values: Values) -> dict[str, torch.Tensor]:
        """Return each term's scalar under its name, unweighted, and their sum as ``total``."""
        losses = self.terms(values)
        losses[TOTAL] = self.total(losses)
        return losses

    def terms(self, values: Values) -> dict[str, torch.Tensor]:
        """Return each term under its name, unweighted."""
        if self.timer is None:
            return {term.name: term(values) for term in self.calls}
        timer = self.timer
        return {t.name: timer("loss", t.name, partial(t, values)) for t in self.calls}

    def total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the terms."""
        total: torch.Tensor | None = None
        for term in self.calls:
            weight = self.weights[term.name]
            weighted = losses[term.name] if weight == 1.0 else losses[term.name] * weight
            total = weighted if total is None else total + weighted
        assert total is not None, "a criterion has at least one term"
        return total
