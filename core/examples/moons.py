"""A data set and a model of one's own, for moons.yaml: no package, just ``-p moons.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.data import Dataset

import distill


class Moons(Dataset[tuple[torch.Tensor, int]]):
    """Points (2,) on two interleaved half circles, with noise."""

    classes = ("upper", "lower")

    def __init__(self, size: int = 200, noise: float = 0.2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        angle = math.pi * torch.rand(size, generator=generator)
        self.labels = torch.arange(size) % 2
        sign = 1.0 - 2.0 * self.labels
        circle = torch.stack([sign * angle.cos() + self.labels, sign * angle.sin()], 1)
        circle[:, 1] += 0.5 * self.labels
        self.points = circle + noise * torch.randn(size, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.labels[index])


class MLP(nn.Module):
    """Points (B, 2) to logits (B, 2) through two hidden layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 2)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(points))
        return logits


@distill.hookimpl
def distill_datasets() -> Mapping[str, Callable[..., object]]:
    return {"Moons": Moons}


@distill.hookimpl
def distill_models() -> Mapping[str, Callable[..., object]]:
    return {"MLP": MLP}
