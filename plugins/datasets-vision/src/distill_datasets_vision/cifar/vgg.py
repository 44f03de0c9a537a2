"""VGG for 32x32 images: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for
Large-Scale Image Recognition", ICLR 2015, configurations A, B, D and E.

As the distillation literature has them: with batch norm, one linear layer instead of three, an
average instead of the fifth max pooling, none between the last two blocks; and an eight-layer one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from distill_datasets_vision.cifar.initial_weights import (
    initialise_classifier,
    initialise_convolutions,
)

_WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(nn.Module):
    """Five blocks of 3x3 convolutions and a linear classifier.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured: ``block0``
    (B, 64, 32, 32), ``block1`` (B, 128, 16, 16), ``block2`` (B, 256, 8, 8), ``block3`` and
    ``block4`` (B, 512, 4, 4), all before their last activation; ``relu0`` to ``relu4``, the same
    after it; ``flatten`` (B, 512) and ``classifier`` (B, num_classes).

    Args:
        convolutions: convolutions of each block.
        num_classes: number of logits.
    """

    def __init__(self, convolutions: Sequence[int], num_classes: int) -> None:
        super().__init__()
        inputs = (3, *_WIDTHS)
        self.block0 = _block(convolutions[0], inputs[0], _WIDTHS[0])
        self.relu0 = nn.ReLU()
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(convolutions[1], inputs[1], _WIDTHS[1])
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(convolutions[2], inputs[2], _WIDTHS[2])
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(convolutions[3], inputs[3], _WIDTHS[3])
        self.relu3 = nn.ReLU()
        self.block4 = _block(convolutions[4], inputs[4], _WIDTHS[4])
        self.relu4 = nn.ReLU()
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(_WIDTHS[4], num_classes)
        initialise_convolutions(self)
        initialise_classifier(self.classifier)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.pool0(self.relu0(self.block0(images)))
        features = self.pool1(self.relu1(self.block1(features)))
        features = self.pool2(self.relu2(self.block2(features)))
        features = self.relu3(self.block3(features))
        features = self.relu4(self.block4(features))
        logits: torch.Tensor = self.classifier(self.flatten(self.pool4(features)))
        return logits


def _block(convolutions: int, inputs: int, width: int) -> nn.Sequential:
    """Return convolutions with batch norm, and activations between them."""
    layers: list[nn.Module] = []
    for index in range(convolutions):
        if index:
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(width if index else inputs, width, 3, padding=1))
        layers.append(nn.BatchNorm2d(width))
    return nn.Sequential(*layers)


def cifar_vgg8(num_classes: int = 100) -> CifarVGG:
    """``CifarVGG`` with a convolution in each block, 3.97 million parameters."""
    return CifarVGG((1, 1, 1, 1, 1), num_classes)


def cifar_vgg11(num_classes: int = 100) -> CifarVGG:
    """``CifarVGG``, the paper's configuration A, 9.28 million parameters."""
    return CifarVGG((1, 1, 2, 2, 2), num_classes)


def cifar_vgg13(num_classes: int = 100) -> CifarVGG:
    """``CifarVGG``, the paper's configuration B, 9.46 million parameters."""
    return CifarVGG((2, 2, 2, 2, 2), num_classes)


def cifar_vgg16(num_classes: int = 100) -> CifarVGG:
    """``CifarVGG``, the paper's configuration D, 14.77 million parameters."""
    return CifarVGG((2, 2, 3, 3, 3), num_classes)


def cifar_vgg19(num_classes: int = 100) -> CifarVGG:
    """``CifarVGG``, the paper's configuration E, 20.09 million parameters."""
    return CifarVGG((2, 2, 4, 4, 4), num_classes)
