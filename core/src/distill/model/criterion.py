"""Weighted terms -> named losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from distill.model.wiring import Call, Values

TOTAL = "total"


class Criterion(nn.Module):
    """The weighted sum of named terms.

    Args:
        terms: the losses and where their arguments come from.
        weights: name -> factor in the total.
    """

    def __init__(self, terms: Sequence[Call], weights: Mapping[str, float]):
        super().__init__()
        self.modules_of_terms = nn.ModuleList(term.module for term in terms)
        self._terms = [(term, weights[term.name]) for term in terms]

    def forward(self, values: Values) -> dict[str, torch.Tensor]:
        """Return each term's scalar under its name, unweighted, and their sum as ``total``."""
        losses = self.terms(values)
        losses[TOTAL] = self.total(losses)
        return losses

    def terms(self, values: Values) -> dict[str, torch.Tensor]:
        """Return each term under its name, unweighted."""
        return {term.name: term(values) for term, _ in self._terms}

    def total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of the terms."""
        total: torch.Tensor | None = None
        for term, weight in self._terms:
            weighted = losses[term.name] if weight == 1.0 else losses[term.name] * weight
            total = weighted if total is None else total + weighted
        assert total is not None, "a criterion has at least one term"
        return total
