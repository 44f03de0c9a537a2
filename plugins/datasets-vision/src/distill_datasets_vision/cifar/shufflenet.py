"""ShuffleNets for 32x32 images.

X. Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
Devices", CVPR 2018, with 3 groups; N. Ma et al., "ShuffleNet V2: Practical Guidelines for
Efficient CNN Architecture Design", ECCV 2018, at width 1.

As the distillation literature has them, which differs from the papers: a 1x1 convolution and no max
pooling in front, and in V1 an activation after the convolution per channel. Weights are initialised
as PyTorch does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_STEM = 24


class ChannelShuffle(nn.Module):
    """Reorder channels so that every group's first comes first, then every group's second, ..."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        grouped: torch.Tensor = features.unflatten(1, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """V1: grouped 1x1, shuffle, 3x3 per channel, grouped 1x1, beside a shortcut.

    (B, inputs, H, W) to (B, outputs, H/stride, W/stride). With stride 2 the averaged input is
    appended to the channels, with stride 1 the input is added. ``relu3:input`` is the result
    before its activation.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: 1 or 2.
        groups: groups of the first and of the last convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: tuple[int, int]) -> None:
        super().__init__()
        self.appends_input = stride == 2
        computed = outputs - inputs if self.appends_input else outputs
        inner = computed // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1, groups=groups[0], bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.shuffle1 = ChannelShuffle(groups[0])
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, computed, 1, groups=groups[1], bias=False)
        self.bn3 = nn.BatchNorm2d(computed)
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if self.appends_input else nn.Identity()
        self.relu3 = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        computed = self.shuffle1(self.relu1(self.bn1(self.conv1(features))))
        computed = self.relu2(self.bn2(self.conv2(computed)))
        computed = self.bn3(self.conv3(computed))
        shortcut = self.shortcut(features)
        joined = torch.cat([computed, shortcut], 1) if self.appends_input else computed + shortcut
        activated: torch.Tensor = self.relu3(joined)
        return activated


class CifarShuffleNetV1(nn.Module):
    """Three stages of 4, 8 and 4 units.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured: ``relu``
    (B, 24, 32, 32), ``layer1`` (B, 240, 16, 16), ``layer2`` (B, 480, 8, 8), ``layer3``
    (B, 960, 4, 4), ``flatten`` (B, 960) and ``linear`` (B, num_classes); before its last activation
    a stage is ``layer1.3.relu3:input``, ``layer2.7.relu3:input`` and ``layer3.3.relu3:input``.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage_v1(_STEM, 240, units=4)
        self.layer2 = _stage_v1(240, 480, units=8)
        self.layer3 = _stage_v1(480, 960, units=4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(960, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: torch.Tensor = self.linear(self.flatten(self.avgpool(features)))
        return logits


def _stage_v1(inputs: int, outputs: int, units: int) -> nn.Sequential:
    # The few channels of the stem are not divided into groups.
    first = ShuffleUnit(inputs, outputs, 2, (1 if inputs == _STEM else 3, 3))
    return nn.Sequential(
        first, *(ShuffleUnit(outputs, outputs, 1, (3, 3)) for _ in range(units - 1))
    )


class SplitUnit(nn.Module):
    """V2, stride 1: half of the channels pass, the others are convolved; then both are shuffled.

    (B, width, H, W) to the same. ``relu3:input`` is the convolved half before its activation.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        passed, convolved = features.chunk(2, dim=1)
        convolved = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(convolved)))))
        convolved = self.relu3(self.bn3(self.conv3(convolved)))
        shuffled: torch.Tensor = self.shuffle(torch.cat([passed, convolved], 1))
        return shuffled


class DownUnit(nn.Module):
    """V2, stride 2: two branches give half of the channels each; then both are shuffled.

    (B, inputs, H, W) to (B, outputs, H/2, W/2).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        short = self.bn1(self.conv1(features))
        short = self.relu2(self.bn2(self.conv2(short)))
        long = self.relu3(self.bn3(self.conv3(features)))
        long = self.bn4(self.conv4(long))
        long = self.relu5(self.bn5(self.conv5(long)))
        shuffled: torch.Tensor = self.shuffle(torch.cat([short, long], 1))
        return shuffled


class CifarShuffleNetV2(nn.Module):
    """Three stages of 4, 8 and 4 units and a 1x1 convolution.

    Images (B, 3, 32, 32) become logits (B, num_classes). What may be captured, with w the widths:
    ``relu`` (B, 24, 32, 32), ``layer1`` (B, w0, 16, 16), ``layer2`` (B, w1, 8, 8), ``layer3``
    (B, w2, 4, 4), ``relu2`` (B, w3, 4, 4), ``flatten`` (B, w3) and ``linear`` (B, num_classes).

    Args:
        widths: channels of the three stages and of the last convolution.
        num_classes: number of logits.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage_v2(_STEM, widths[0], units=4)
        self.layer2 = _stage_v2(widths[0], widths[1], units=8)
        self.layer3 = _stage_v2(widths[1], widths[2], units=4)
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        features = self.relu2(self.bn2(self.conv2(features)))
        logits: torch.Tensor = self.linear(self.flatten(self.avgpool(features)))
        return logits


def _stage_v2(inputs: int, outputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(inputs, outputs), *(SplitUnit(outputs) for _ in range(units - 1)))


def cifar_shufflenet_v1(num_classes: int = 100) -> CifarShuffleNetV1:
    """``CifarShuffleNetV1`` with 3 groups, 0.95 million parameters."""
    return CifarShuffleNetV1(num_classes)


def cifar_shufflenet_v2(num_classes: int = 100) -> CifarShuffleNetV2:
    """``CifarShuffleNetV2`` with widths 116, 232, 464 and 1024, 1.36 million parameters."""
    return CifarShuffleNetV2((116, 232, 464, 1024), num_classes)
