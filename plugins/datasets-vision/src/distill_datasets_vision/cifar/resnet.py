"""Residual networks for 32x32 images.

K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (three stages)
and section 4.1 (four stages, made for ImageNet).

All parameters and buffers are named as in the distillation literature (``layer1.0.conv1.weight``).
Every activation is a module of its own and none works in place, so a block's sum before its last
activation can be captured as ``layer1.0.relu2:input``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from distill_datasets_vision.cifar.initial_weights import initialise_convolutions


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, inputs, H, W) to (B, width, H/stride, W/stride).

    ``relu2:input`` is the sum of both, ``relu2`` and the block itself what is left of it.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        residual = self.relu1(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        activated: torch.Tensor = self.relu2(residual + self.downsample(features))
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution: (B, inputs, H, W) to (B, 4 * width, H/stride, W/stride).

    The stride is that of the 3x3 convolution. ``relu3:input`` is the sum with the shortcut.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        residual = self.relu1(self.bn1(self.conv1(features)))
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        activated: torch.Tensor = self.relu3(residual + self.downsample(features))
        return activated


class CifarResNet(nn.Module):
    """Three stages of basic blocks, 6 * blocks + 2 layers.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured, with w the widths:
    ``relu`` (B, w0, 32, 32), ``layer1`` (B, w1, 32, 32), ``layer2`` (B, w2, 16, 16), ``layer3``
    (B, w3, 8, 8), ``flatten`` (B, w3) and ``fc`` (B, num_classes); before its last activation a
    stage is ``layer1.N.relu2:input`` with N = blocks - 1.

    A shortcut between different shapes is a 1x1 convolution with batch norm (option B), as in the
    distillation literature; the paper's own networks pad with zeros there (option A), which saves
    2,752 parameters at the usual widths.

    Args:
        blocks: blocks of each stage.
        widths: channels of the first convolution and of the three stages.
        num_classes: number of logits.
    """

    def __init__(self, blocks: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(BasicBlock, stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(BasicBlock, stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(BasicBlock, stages[1], stages[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(stages[2], num_classes)
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: torch.Tensor = self.fc(self.flatten(self.avgpool(features)))
        return logits


class FourStageResNet(nn.Module):
    """ImageNet's residual networks with a 3x3 convolution of stride 1 in front and no max pooling.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured, with e = 1 for basic
    blocks and 4 for bottlenecks: ``relu`` (B, 64, 32, 32), ``layer1`` (B, 64e, 32, 32), ``layer2``
    (B, 128e, 16, 16), ``layer3`` (B, 256e, 8, 8), ``layer4`` (B, 512e, 4, 4), ``flatten``
    (B, 512e) and ``fc`` (B, num_classes).

    Parameters are named as in torchvision; their shapes differ in ``conv1`` alone.

    Args:
        block: kind of block.
        blocks: blocks of each of the four stages.
        num_classes: number of logits.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        inputs = [64, *(width * block.expansion for width in (64, 128, 256))]
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, inputs[0], 64, blocks[0], stride=1)
        self.layer2 = _stage(block, inputs[1], 128, blocks[1], stride=2)
        self.layer3 = _stage(block, inputs[2], 256, blocks[2], stride=2)
        self.layer4 = _stage(block, inputs[3], 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        logits: torch.Tensor = self.fc(self.flatten(self.avgpool(features)))
        return logits


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(
    block: type[BasicBlock | Bottleneck], inputs: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    later = (block(block.expansion * width, width) for _ in range(blocks - 1))
    return nn.Sequential(block(inputs, width, stride), *later)


_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)


def cifar_resnet8(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 8 layers, 0.08 million parameters."""
    return CifarResNet(1, _NARROW, num_classes)


def cifar_resnet14(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 14 layers, 0.18 million parameters."""
    return CifarResNet(2, _NARROW, num_classes)


def cifar_resnet20(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 20 layers, 0.28 million parameters."""
    return CifarResNet(3, _NARROW, num_classes)


def cifar_resnet32(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 32 layers, 0.47 million parameters."""
    return CifarResNet(5, _NARROW, num_classes)


def cifar_resnet44(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 44 layers, 0.67 million parameters."""
    return CifarResNet(7, _NARROW, num_classes)


def cifar_resnet56(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 56 layers, 0.86 million parameters."""
    return CifarResNet(9, _NARROW, num_classes)


def cifar_resnet110(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 110 layers, 1.74 million parameters."""
    return CifarResNet(18, _NARROW, num_classes)


def cifar_resnet8x4(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 8 layers, widths 32, 64, 128 and 256, 1.23 million parameters."""
    return CifarResNet(1, _WIDE, num_classes)


def cifar_resnet32x4(num_classes: int = 100) -> CifarResNet:
    """``CifarResNet`` with 32 layers, widths 32, 64, 128 and 256, 7.43 million parameters."""
    return CifarResNet(5, _WIDE, num_classes)


def cifar_resnet18(num_classes: int = 100) -> FourStageResNet:
    """``FourStageResNet`` with 18 layers, basic blocks, 11.22 million parameters."""
    return FourStageResNet(BasicBlock, (2, 2, 2, 2), num_classes)


def cifar_resnet34(num_classes: int = 100) -> FourStageResNet:
    """``FourStageResNet`` with 34 layers, basic blocks, 21.33 million parameters."""
    return FourStageResNet(BasicBlock, (3, 4, 6, 3), num_classes)


def cifar_resnet50(num_classes: int = 100) -> FourStageResNet:
    """``FourStageResNet`` with 50 layers, bottlenecks, 23.71 million parameters."""
    return FourStageResNet(Bottleneck, (3, 4, 6, 3), num_classes)
