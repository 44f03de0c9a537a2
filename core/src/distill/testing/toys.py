"""Data and models that take no time."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset


class ToyData(Dataset[tuple[torch.Tensor, int]]):
    """Noisy points (or images) around one centre a class, the same for the same arguments.

    Items are a float32 tensor of ``shape`` and the label as int.
    """

    def __init__(
        self, size: int = 16, classes: int = 3, shape: tuple[int, ...] = (4,), seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(size) % classes
        self.labels = labels.tolist()
        self.inputs = centres[labels] + 0.5 * torch.randn(size, *shape, generator=generator)
        self.classes = [f"class {number}" for number in range(classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], self.labels[index]


class ToyMLP(nn.Module):
    """Points (B, features) -> logits (B, classes); ``body`` ends with an in-place ReLU."""

    def __init__(self, hidden: int = 8, features: int = 4, classes: int = 3, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.dropout(self.body(inputs)))
        return logits


class ToyConvNet(nn.Module):
    """Images (B, 1, H, W) -> logits (B, classes), with BatchNorm and an in-place ReLU."""

    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        features = self.relu(self.norm(self.conv(inputs)))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits
