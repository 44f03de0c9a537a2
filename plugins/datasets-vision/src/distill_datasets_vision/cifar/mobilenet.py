"""MobileNetV2 for 32x32 images: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", CVPR 2018.

As the distillation literature has it, which differs from the paper: the second stage keeps its
resolution, the first block has an expanding convolution though it does not expand, activations are
not cut off at 6, channels are not rounded to multiples of 8, and there is no dropout.
"""

from __future__ import annotations

import torch
from torch import nn

from distill_datasets_vision.cifar.initial_weights import (
    initialise_classifier,
    initialise_convolutions,
)

# Expansion, channels at width 1, blocks and stride of each stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST = 1280


class InvertedResidual(nn.Module):
    """Expand, filter per channel, project: (B, inputs, H, W) to (B, outputs, H/stride, W/stride).

    The output is not activated. Where shapes agree, the input is added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.adds_input = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.conv(features)
        return features + projected if self.adds_input else projected


class CifarMobileNetV2(nn.Module):
    """Seven stages of inverted residuals.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured, with m the width:
    ``conv1`` (B, 32m, 16, 16), ``blocks.0`` (B, 16m, 16, 16), ``blocks.1`` (B, 24m, 16, 16),
    ``blocks.2`` (B, 32m, 8, 8), ``blocks.3`` (B, 64m, 4, 4), ``blocks.4`` (B, 96m, 4, 4),
    ``blocks.5`` (B, 160m, 2, 2), ``blocks.6`` (B, 320m, 2, 2), ``conv2`` (B, 1280, 2, 2),
    ``flatten`` (B, 1280) and ``classifier`` (B, num_classes). The stages' outputs are not
    activated.

    Args:
        width: what all channels but the last 1280 are multiplied by.
        num_classes: number of logits.
    """

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        inputs = int(32 * width)
        self.conv1 = _activated(nn.Conv2d(3, inputs, 3, 2, padding=1, bias=False))
        stages = []
        for expansion, channels, blocks, stride in _STAGES:
            outputs = int(channels * width)
            first = InvertedResidual(inputs, outputs, stride, expansion)
            later = (InvertedResidual(outputs, outputs, 1, expansion) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *later))
            inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.conv2 = _activated(nn.Conv2d(inputs, _LAST, 1, bias=False))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        linear = nn.Linear(_LAST, num_classes)
        self.classifier = nn.Sequential(linear)
        initialise_convolutions(self)
        initialise_classifier(linear)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv2(self.blocks(self.conv1(images)))
        logits: torch.Tensor = self.classifier(self.flatten(self.avgpool(features)))
        return logits


def _activated(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def cifar_mobilenet_v2(num_classes: int = 100) -> CifarMobileNetV2:
    """``CifarMobileNetV2`` at width 1, 2.35 million parameters."""
    return CifarMobileNetV2(1.0, num_classes)


def cifar_mobilenet_v2_half(num_classes: int = 100) -> CifarMobileNetV2:
    """``CifarMobileNetV2`` at width 0.5, 0.81 million parameters: the usual student."""
    return CifarMobileNetV2(0.5, num_classes)
