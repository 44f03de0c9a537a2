"""MixUp and CutMix of torchvision, for the images and labels of a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchvision.transforms.v2 import CutMix as TorchvisionCutMix  # type: ignore[attr-defined]
from torchvision.transforms.v2 import MixUp as TorchvisionMixUp  # type: ignore[attr-defined]

Mixed = tuple[torch.Tensor, torch.Tensor]


class MixUp:
    """Blends every image and label with the one before it in the batch.

    All of a batch are blended in one ratio, drawn from Beta(alpha, alpha) with torch's generator
    of the CPU. What is drawn does not depend on the size of the batch.

    Called with images, floating point (B, C, H, W), and labels, whole numbers (B,), or targets
    that are soft already (B, num_classes); returns images and soft targets (B, num_classes).

    Args:
        num_classes: number of classes.
        alpha: above 0; the smaller, the nearer to one of the two images.

    Raises:
        ValueError: if alpha or num_classes is too small; called, if a label is not below
            ``num_classes`` or images or targets have another shape or type.

    Source: H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018,
    arXiv:1710.09412, which blends with a random other image of the batch.
    """

    def __init__(self, num_classes: int, alpha: float = 1.0) -> None:
        _refuse_unless_positive("num_classes", num_classes)
        _refuse_unless_positive("alpha", alpha)
        self._num_classes = num_classes
        self._mix = TorchvisionMixUp(num_classes=num_classes, alpha=alpha)

    def __call__(self, inputs: Any, targets: Any) -> Mixed:
        return _mixed(self._mix, inputs, soft_targets(inputs, targets, self._num_classes))


class CutMix:
    """Puts a box of the image before it into every image, and mixes the labels by its area.

    All of a batch have the box at one place; its area is drawn from Beta(alpha, alpha) and then
    clipped to the image. Otherwise as ``MixUp``.

    Source: S. Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features, ICCV 2019, arXiv:1905.04899, which takes a random other image.
    """

    def __init__(self, num_classes: int, alpha: float = 1.0) -> None:
        _refuse_unless_positive("num_classes", num_classes)
        _refuse_unless_positive("alpha", alpha)
        self._num_classes = num_classes
        self._mix = TorchvisionCutMix(num_classes=num_classes, alpha=alpha)

    def __call__(self, inputs: Any, targets: Any) -> Mixed:
        return _mixed(self._mix, inputs, soft_targets(inputs, targets, self._num_classes))


class MixUpOrCutMix:
    """For each batch either ``MixUp`` or ``CutMix`` or neither, in which case labels become soft.

    Args:
        num_classes: number of classes.
        mixup_alpha: alpha of MixUp.
        cutmix_alpha: alpha of CutMix.
        probability: how often one of both is applied.
        switch_probability: how often that one is CutMix.

    Raises:
        ValueError: as ``MixUp``, and if a probability is not from 0 to 1.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
    ) -> None:
        _refuse_unless_positive("mixup_alpha", mixup_alpha)
        _refuse_unless_positive("cutmix_alpha", cutmix_alpha)
        _refuse_unless_probability("probability", probability)
        _refuse_unless_probability("switch_probability", switch_probability)
        self._num_classes = num_classes
        self._mixup = MixUp(num_classes, mixup_alpha)
        self._cutmix = CutMix(num_classes, cutmix_alpha)
        self._probability = probability
        self._switch_probability = switch_probability

    def __call__(self, inputs: Any, targets: Any) -> Mixed:
        mixes, switches = torch.rand(2).tolist()
        if mixes >= self._probability:
            return inputs, soft_targets(inputs, targets, self._num_classes)
        if switches < self._switch_probability:
            return self._cutmix(inputs, targets)
        return self._mixup(inputs, targets)


def soft_targets(inputs: Any, targets: Any, num_classes: int) -> torch.Tensor:
    """Return targets as probabilities (B, num_classes), floating point.

    On a GPU nobody waits to see whether all labels are below ``num_classes``: one that is not gets
    NaN, with which the step ends the run.

    Raises:
        ValueError: if they, or the images (B, C, H, W), are not of a kind that can be mixed.
    """
    _refuse_unless_images(inputs)
    if not isinstance(targets, torch.Tensor) or targets.shape[:1] != inputs.shape[:1]:
        raise ValueError("there must be a tensor with one label for each image")
    if targets.ndim == 2:
        if targets.shape[1] != num_classes:
            raise ValueError(
                f"targets have {targets.shape[1]} classes, num_classes is {num_classes}"
            )
        return targets if targets.is_floating_point() else targets.float()
    if targets.ndim != 1 or targets.is_floating_point():
        raise ValueError(
            "targets must be labels, whole numbers (B,), or probabilities (B, num_classes); "
            f"these are {targets.dtype} {tuple(targets.shape)}"
        )
    if targets.device.type == "cpu":
        _refuse_unless_labels(targets, num_classes)
    is_class = targets[:, None] == torch.arange(num_classes, device=targets.device)
    is_label = (targets >= 0).logical_and(targets < num_classes)
    return is_class.float().masked_fill(is_label.logical_not()[:, None], math.nan)


def _refuse_unless_labels(targets: torch.Tensor, num_classes: int) -> None:
    lowest, highest = torch.stack(targets.aminmax()).tolist()
    if lowest < 0 or highest >= num_classes:
        label = lowest if lowest < 0 else highest
        raise ValueError(
            f"there is a label {label}; with num_classes {num_classes} labels are from "
            f"0 to {num_classes - 1}"
        )


def _mixed(mix: Any, images: torch.Tensor, targets: torch.Tensor) -> Mixed:
    mixed_images, mixed_targets = mix(images, targets)
    return mixed_images, mixed_targets


def _refuse_unless_images(inputs: Any) -> None:
    if not isinstance(inputs, torch.Tensor):
        raise ValueError(f"inputs must be one tensor of images, not {type(inputs).__name__}")
    if inputs.ndim != 4 or not inputs.is_floating_point():
        raise ValueError(
            "images must be floating point (B, C, H, W) "
            f"(transforms ToImage and ToDtype); these are {inputs.dtype} {tuple(inputs.shape)}"
        )


def _refuse_unless_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}: it must be above 0")


def _refuse_unless_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be from 0 to 1")
