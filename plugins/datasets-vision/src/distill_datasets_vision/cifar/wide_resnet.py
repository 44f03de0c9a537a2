"""Wide residual networks: S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016.

Batch norm and activation stand before each convolution. Parameters are named as in the
distillation literature (``block1.layer.0.conv1.weight``).
"""

from __future__ import annotations

import torch
from torch import nn

from distill_datasets_vision.cifar.initial_weights import initialise_convolutions


class WideBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, inputs, H, W) to (B, width, H/stride, W/stride).

    Where shapes differ, the shortcut is a 1x1 convolution of the activated input; elsewhere it is
    the input itself. The block's output is not activated.
    """

    def __init__(self, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None  # named so in the published checkpoints
        if stride != 1 or inputs != width:
            self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        activated = self.relu1(self.bn1(features))
        residual = self.relu2(self.bn2(self.conv1(activated)))
        residual = self.conv2(self.dropout(residual))
        shortcut = features if self.convShortcut is None else self.convShortcut(activated)
        total: torch.Tensor = shortcut + residual
        return total


class WideStage(nn.Module):
    """Blocks of one width; the stride is that of the first."""

    def __init__(self, blocks: int, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        later = (WideBlock(width, width, 1, dropout) for _ in range(blocks - 1))
        self.layer = nn.Sequential(WideBlock(inputs, width, stride, dropout), *later)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        stage: torch.Tensor = self.layer(features)
        return stage


class WideResNet(nn.Module):
    """WRN-depth-k with depth = 6 * blocks + 4.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured, with k the widening
    factor: ``conv1`` (B, 16, 32, 32), ``block1`` (B, 16k, 32, 32), ``block2`` (B, 32k, 16, 16),
    ``block3`` (B, 64k, 8, 8), ``relu`` (B, 64k, 8, 8), ``flatten`` (B, 64k) and ``fc``
    (B, num_classes). The blocks' outputs are not activated; after batch norm they are
    ``block2.layer.0.bn1``, ``block3.layer.0.bn1`` and ``bn1``, and activated
    ``block2.layer.0.relu1``, ``block3.layer.0.relu1`` and ``relu``.

    Args:
        blocks: blocks of each stage.
        widening: how many times wider than a plain residual network.
        num_classes: number of logits.
        dropout: probability of dropping a value between the convolutions of a block.
    """

    def __init__(self, blocks: int, widening: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        width = 16 * widening
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, width, 1, dropout)
        self.block2 = WideStage(blocks, width, 2 * width, 2, dropout)
        self.block3 = WideStage(blocks, 2 * width, 4 * width, 2, dropout)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.block3(self.block2(self.block1(self.conv1(images))))
        features = self.relu(self.bn1(features))
        logits: torch.Tensor = self.fc(self.flatten(self.avgpool(features)))
        return logits


def cifar_wrn_16_1(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """``WideResNet`` with 16 layers, 0.18 million parameters."""
    return WideResNet(2, 1, num_classes, dropout)


def cifar_wrn_16_2(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """``WideResNet`` with 16 layers, twice as wide, 0.70 million parameters."""
    return WideResNet(2, 2, num_classes, dropout)


def cifar_wrn_28_2(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """``WideResNet`` with 28 layers, twice as wide, 1.48 million parameters."""
    return WideResNet(4, 2, num_classes, dropout)


def cifar_wrn_28_10(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """``WideResNet`` with 28 layers, ten times as wide, 36.54 million parameters."""
    return WideResNet(4, 10, num_classes, dropout)


def cifar_wrn_40_1(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """``WideResNet`` with 40 layers, 0.57 million parameters."""
    return WideResNet(6, 1, num_classes, dropout)


def cifar_wrn_40_2(num_classes: int = 100, dropout: float = 0.0) -> WideResNet:
    """``WideResNet`` with 40 layers, twice as wide, 2.26 million parameters."""
    return WideResNet(6, 2, num_classes, dropout)
