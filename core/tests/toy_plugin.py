"""A plugin of toy parts for core's own tests, loaded as a local file as ``-p`` does."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import nn

from distill import EpochEnd, Observer, hookimpl
from distill.testing import ToyConvNet, ToyData, ToyMLP


class Scale:
    """Multiplies an input."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.factor


class Flavour(enum.Enum):
    """What a parameter chooses from by name."""

    SOFT = "soft"
    HARD = "hard"


class Distance(nn.Module):
    """Squared distance of logits to a teacher's."""

    def __init__(self, scale: float = 1.0, flavour: Flavour = Flavour.SOFT):
        super().__init__()
        self.scale, self.flavour = scale, flavour

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.scale * (student - teacher).square().mean()


class Listener(Observer):
    """Prints the epochs it hears of."""

    def __init__(self, loud: bool = False):
        self.loud = loud

    def epoch_end(self, event: EpochEnd) -> None:
        print("EPOCH" if self.loud else "epoch", event.position.epoch)


def open_ended(**params: Any) -> ToyMLP:
    """A model whose parameters only it knows."""
    return ToyMLP(**params)


@hookimpl
def distill_datasets() -> dict[str, Any]:
    return {"ToyData": ToyData}


@hookimpl
def distill_transforms() -> dict[str, Any]:
    return {"Scale": Scale}


@hookimpl
def distill_models() -> dict[str, Any]:
    return {"ToyMLP": ToyMLP, "ToyConvNet": ToyConvNet, "open_ended": open_ended}


@hookimpl
def distill_losses() -> dict[str, Any]:
    return {"Distance": Distance}


@hookimpl
def distill_observers() -> dict[str, Any]:
    return {"Listener": Listener}
