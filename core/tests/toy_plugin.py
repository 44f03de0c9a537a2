"""A plugin of toy parts for core's own tests, loaded as a local file as ``-p`` does."""

from __future__ import annotations

import enum
from typing import Any

import torch
from distill import Batch, EpochEnd, Observer, hookimpl
from torch import nn


class Blobs:
    """Points around one centre for each class, drawn from a seed."""

    def __init__(self, size: int = 24, classes: int = 3, features: int = 4, seed: int = 0):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.classes = [f"class {number}" for number in range(classes)]
        self.labels = [number % classes for number in range(size)]
        noise = torch.randn(size, features, generator=generator, device="cpu")
        self.points = noise + 3.0 * torch.tensor(self.labels, device="cpu").unsqueeze(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], self.labels[index]


class Unreadable(Blobs):
    """A data set whose files are not there."""

    def __init__(self, root: str):
        raise FileNotFoundError(f"no such folder: {root}")


class Scale:
    """Multiplies an input."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.factor


class MLP(nn.Module):
    """Two layers: ``hidden`` and ``head``."""

    def __init__(self, width: int = 8, features: int = 4, classes: int = 3):
        super().__init__()
        self.hidden = nn.Linear(features, width)
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.activation(self.hidden(x)))
        return output


class ConvNet(nn.Module):
    """A convolution with BatchNorm and a head."""

    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.pool(self.stem(x)).flatten(1))
        return output


class Flavour(enum.Enum):
    """What a parameter chooses from by name."""

    SOFT = "soft"
    HARD = "hard"


class Distance(nn.Module):
    """Squared distance of logits to a teacher's; its parameters have every kind of hint."""

    def __init__(self, scale: float = 1.0, flavour: Flavour = Flavour.SOFT, steps: int = 1):
        super().__init__()
        self.scale, self.flavour, self.steps = scale, flavour, steps

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.scale * (student - teacher).square().mean()


class Pair(nn.Module):
    """Gives two values by name."""

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"plus": features, "minus": -features}


class LargestLogit:
    """A metric other than accuracy."""

    def reset(self) -> None:
        self.largest = 0.0

    def update(self, output: Any, batch: Batch) -> None:
        self.largest = max(self.largest, float(output.max()))

    def state(self) -> float:
        return self.largest

    def merge(self, state: float) -> None:
        self.largest = max(self.largest, state)

    def compute(self) -> float:
        return self.largest


class Listener(Observer):
    """Hears of epochs."""

    def __init__(self, loud: bool = False):
        self.loud = loud
        self.heard: list[EpochEnd] = []

    def epoch_end(self, event: EpochEnd) -> None:
        self.heard.append(event)


def open_ended(**params: Any) -> MLP:
    """An MLP whose parameters only it knows."""
    return MLP(**params)


@hookimpl
def distill_datasets() -> dict[str, Any]:
    return {"Blobs": Blobs, "Unreadable": Unreadable}


@hookimpl
def distill_transforms() -> dict[str, Any]:
    return {"Scale": Scale}


@hookimpl
def distill_models() -> dict[str, Any]:
    return {"MLP": MLP, "ConvNet": ConvNet, "open_ended": open_ended}


@hookimpl
def distill_losses() -> dict[str, Any]:
    return {"Distance": Distance}


@hookimpl
def distill_auxiliary_modules() -> dict[str, Any]:
    return {"Pair": Pair}


@hookimpl
def distill_metrics() -> dict[str, Any]:
    return {"LargestLogit": LargestLogit}


@hookimpl
def distill_observers() -> dict[str, Any]:
    return {"Listener": Listener}
