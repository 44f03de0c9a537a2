"""Vision for distill: torchvision's data sets, transforms and models, and a small digits set.

The name in an experiment file is torchvision's own: ``CIFAR10``, ``RandomCrop``, ``resnet18``.
``Digits``, ``DigitsTeacher`` and ``DigitsStudent`` need neither a download nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill import hookimpl
from distill_datasets_vision.datasets import torchvision_datasets
from distill_datasets_vision.digits import Digits
from distill_datasets_vision.digits_models import DigitsStudent, DigitsTeacher
from distill_datasets_vision.models import torchvision_models
from distill_datasets_vision.transforms import torchvision_transforms

__all__ = [
    "Digits",
    "DigitsStudent",
    "DigitsTeacher",
    "distill_datasets",
    "distill_models",
    "distill_transforms",
]


@hookimpl
def distill_datasets() -> Mapping[str, Callable[..., Any]]:
    """``Digits`` and the data sets of ``torchvision.datasets``."""
    return {**torchvision_datasets(), "Digits": Digits}


@hookimpl
def distill_transforms() -> Mapping[str, Callable[..., Any]]:
    """The transforms of ``torchvision.transforms.v2`` that turn one image into one image."""
    return torchvision_transforms()


@hookimpl
def distill_models() -> Mapping[str, Callable[..., Any]]:
    """The models of ``torchvision.models`` and two small ones for ``Digits``."""
    return {
        **torchvision_models(),
        "DigitsStudent": DigitsStudent,
        "DigitsTeacher": DigitsTeacher,
    }
