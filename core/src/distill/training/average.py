"""An exponential moving average of a model's weights (EMA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distill.config.experiment import EMA
from distill.training import sharding


class Average:
    """Follows a model: ``average = decay * average + (1 - decay) * model`` after each step.

    Running statistics are averaged like weights; counters are copied. With ``warmup`` the decay of
    the t-th step is ``min(decay, (1 + t) / (10 + t))``, so that a short run is not held back by
    the initial weights.

    Args:
        model: what holds the average, with the weights of the model it follows.
        settings: decay and warm-up.

    Attributes:
        updates: steps followed, with those whose overflow in fp16 is known later only.
    """

    def __init__(self, model: nn.Module, settings: EMA):
        self.model = model.requires_grad_(False)
        self.updates = 0
        self._settings = settings

    @property
    def decay(self) -> float:
        """The decay of the next step."""
        most, done = self._settings.decay, self.updates
        return min(most, (2 + done) / (11 + done)) if self._settings.warmup else most

    def state_dict(self) -> dict[str, Any]:
        """Return average and count; under sharding every process must ask for it."""
        return {"model": sharding.whole(self.model.state_dict()), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        sharding.load(self.model, state["model"])
        self.updates = state["updates"]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow ``model`` by one step."""
        averages, values = [], []
        own = [*self.model.parameters(), *self.model.buffers()]
        given = [*model.parameters(), *model.buffers()]
        for average, value in zip(own, given, strict=True):
            if average.is_floating_point():
                averages.append(sharding.local_part(average))
                values.append(sharding.local_part(value))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - self.decay)
        self.updates += 1
