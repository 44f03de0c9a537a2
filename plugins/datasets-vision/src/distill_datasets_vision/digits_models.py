"""Two small convolutional networks for ``Digits``, to be teacher and student."""

from __future__ import annotations

import torch
from torch import nn


class DigitsTeacher(nn.Module):
    """Three blocks and a linear classifier: 58,474 parameters at the usual width.

    Images (B, 1, 8, 8) become logits (B, num_classes). What may be captured, with w the width:
    ``block1`` (B, w, 8, 8), ``block2`` (B, 2w, 4, 4), ``block3`` (B, 2w, 4, 4), ``flatten``
    (B, 8w) and ``fc`` (B, num_classes).

    Args:
        width: channels of the first block; the others have twice as many.
        num_classes: number of logits.
    """

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.block1 = _block(1, width)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(width, 2 * width)
        self.block3 = _block(2 * width, 2 * width)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.block3(self.block2(self.pool1(self.block1(images))))
        logits: torch.Tensor = self.fc(self.flatten(self.pool2(features)))
        return logits


class DigitsStudent(nn.Module):
    """Two blocks and a linear classifier: 6,138 parameters at the usual width.

    Images (B, 1, 8, 8) become logits (B, num_classes). What may be captured, with w the width:
    ``block1`` (B, w, 8, 8), ``block2`` (B, 2w, 4, 4), ``flatten`` (B, 8w) and ``fc``
    (B, num_classes).

    Args:
        width: channels of the first block; the second has twice as many.
        num_classes: number of logits.
    """

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.block1 = _block(1, width)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(width, 2 * width)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.block2(self.pool1(self.block1(images)))
        logits: torch.Tensor = self.fc(self.flatten(self.pool2(features)))
        return logits


def _block(inputs: int, outputs: int) -> nn.Sequential:
    # Not in place: a captured activation must keep the value it had.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
