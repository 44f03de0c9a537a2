"""What torch brings by name: losses, layers, optimizers, schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

Components = Mapping[str, Callable[..., Any]]

LAYERS = (
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "Flatten",
    "GroupNorm",
    "Identity",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Upsample",
)
NEEDS_CLOSURE = {"LBFGS"}
TAKES_CODE_OR_OBJECTS = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` of the student's logits, wired by itself.

    Shapes: ``student`` (B, K), (B, K, H, W, ...) with classes in dimension 1, or (B, T, V) with
    classes last, unless only dimension 1 fits the labels; ``targets`` int64 of that shape without
    classes, or class probabilities of the student's shape. Gives the mean over labels.
    """

    def forward(self, student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        if student.dim() == 3 and targets.shape in (student.shape[:2], student.shape):
            student = student.movedim(2, 1)
            targets = targets.movedim(2, 1) if targets.dim() == 3 else targets
        return super().forward(student, targets)


def losses() -> Components:
    """Return torch's losses by name, with core's own ``CrossEntropyLoss``."""
    found = {
        name: cls
        for name, cls in _classes(nn, nn.Module).items()
        if name.endswith("Loss") and _is_buildable(cls)
    }
    return {**found, "CrossEntropyLoss": CrossEntropyLoss}


def auxiliary_modules() -> Components:
    """Return torch's layers that serve between two models' features."""
    return {name: getattr(nn, name) for name in LAYERS}


def optimizers() -> Components:
    """Return torch's optimizers that need no closure."""
    found = _classes(torch.optim, torch.optim.Optimizer)
    return {n: cls for n, cls in found.items() if n not in {"Optimizer", *NEEDS_CLOSURE}}


def schedulers() -> Components:
    """Return torch's schedulers whose parameters are plain data."""
    found = _classes(lr_scheduler, lr_scheduler.LRScheduler)
    excluded = {"LRScheduler", "_LRScheduler", *TAKES_CODE_OR_OBJECTS}
    return {name: cls for name, cls in found.items() if name not in excluded}


def _classes(module: ModuleType, base: type) -> dict[str, type[Any]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base)
    }


def _is_buildable(cls: type[Any]) -> bool:
    """Whether a loss gives a scalar from plain parameters: not a base class, no extra outputs."""
    return not cls.__name__.startswith("_") and cls is not nn.AdaptiveLogSoftmaxWithLoss
