"""Other ways to call a model than with the inputs of a batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from distill import Batch


class WithTargets(nn.Module):
    """Calls a model with inputs and targets while it trains, with inputs alone otherwise.

    For models that compute losses of their own, such as torchvision's detectors: in training their
    output is a mapping of losses, which ``ModelLoss`` makes terms of.

    Args:
        model: called as ``model(inputs, targets)`` and ``model(inputs)``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Any:
        """Return the model's output."""
        return (
            self.model(batch.inputs, batch.targets) if self.training else self.model(batch.inputs)
        )
