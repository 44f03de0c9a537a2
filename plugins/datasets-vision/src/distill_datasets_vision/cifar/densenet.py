"""Densely connected networks with bottlenecks and compression (DenseNet-BC) for 32x32 images.

G. Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import nn

from distill_datasets_vision.cifar.initial_weights import initialise_convolutions


class DenseLayer(nn.Module):
    """1x1 and 3x3 convolution whose result is appended: (B, inputs, H, W) to (B, inputs + k, H, W).

    Args:
        inputs: channels that come in.
        growth: k, channels appended; between the convolutions there are 4k.
        dropout: probability of dropping a value that is appended.
    """

    def __init__(self, inputs: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        grown = self.conv1(self.relu1(self.bn1(features)))
        grown = self.conv2(self.relu2(self.bn2(grown)))
        return torch.cat([features, self.dropout(grown)], 1)


class Transition(nn.Module):
    """Halve channels and resolution: (B, inputs, H, W) to (B, inputs // 2, H/2, W/2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        halved: torch.Tensor = self.pool(self.conv1(self.relu(self.bn1(features))))
        return halved


class CifarDenseNet(nn.Module):
    """DenseNet-BC with 6 * layers + 4 layers.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured, with n the layers of
    a block and k the growth: ``conv1`` (B, 2k, 32, 32), ``dense1`` (B, c1, 32, 32), ``trans1``
    (B, c1 // 2, 16, 16), ``dense2`` (B, c2, 16, 16), ``trans2`` (B, c2 // 2, 8, 8), ``dense3``
    (B, c3, 8, 8), ``relu`` (B, c3, 8, 8), ``flatten`` (B, c3) and ``fc`` (B, num_classes), where
    c1 = 2k + nk, c2 = c1 // 2 + nk and c3 = c2 // 2 + nk. The blocks' outputs are neither
    normalised nor activated.

    Args:
        layers: layers of each of the three blocks.
        growth: channels that each of them appends.
        num_classes: number of logits.
        dropout: probability of dropping a value that is appended.
    """

    def __init__(self, layers: int, growth: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.dense1 = _block(width, layers, growth, dropout)
        width += layers * growth
        self.trans1 = Transition(width)
        width //= 2
        self.dense2 = _block(width, layers, growth, dropout)
        width += layers * growth
        self.trans2 = Transition(width)
        width //= 2
        self.dense3 = _block(width, layers, growth, dropout)
        width += layers * growth
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.trans1(self.dense1(self.conv1(images)))
        features = self.dense3(self.trans2(self.dense2(features)))
        features = self.relu(self.bn(features))
        logits: torch.Tensor = self.fc(self.flatten(self.avgpool(features)))
        return logits


def _block(inputs: int, layers: int, growth: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        *(DenseLayer(inputs + index * growth, growth, dropout) for index in range(layers))
    )


def cifar_densenet_bc_40_12(num_classes: int = 100, dropout: float = 0.0) -> CifarDenseNet:
    """``CifarDenseNet`` with 40 layers and growth 12, 0.19 million parameters."""
    return CifarDenseNet(6, 12, num_classes, dropout)


def cifar_densenet_bc_100_12(num_classes: int = 100, dropout: float = 0.0) -> CifarDenseNet:
    """``CifarDenseNet`` with 100 layers and growth 12, 0.80 million parameters."""
    return CifarDenseNet(16, 12, num_classes, dropout)


def cifar_densenet_bc_190_40(num_classes: int = 100, dropout: float = 0.0) -> CifarDenseNet:
    """``CifarDenseNet`` with 190 layers and growth 40, 25.82 million parameters."""
    return CifarDenseNet(31, 40, num_classes, dropout)


def cifar_densenet_bc_250_24(num_classes: int = 100, dropout: float = 0.0) -> CifarDenseNet:
    """``CifarDenseNet`` with 250 layers and growth 24, 15.48 million parameters."""
    return CifarDenseNet(41, 24, num_classes, dropout)
