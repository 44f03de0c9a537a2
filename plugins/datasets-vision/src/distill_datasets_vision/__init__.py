"""Vision for distill: torchvision's data sets, transforms and models, and a small digits set.

The name in an experiment file is torchvision's own: ``CIFAR10``, ``RandomCrop``, ``resnet18``.
``Digits``, ``DigitsTeacher`` and ``DigitsStudent`` need neither a download nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torchvision.models import VisionTransformer

from distill import hookimpl
from distill_datasets_vision.batch_transforms import CutMix, MixUp, MixUpOrCutMix
from distill_datasets_vision.batched_transforms import batched_transforms
from distill_datasets_vision.cifar import cifar_models
from distill_datasets_vision.datasets import torchvision_datasets
from distill_datasets_vision.digits import Digits
from distill_datasets_vision.digits_models import DigitsStudent, DigitsTeacher
from distill_datasets_vision.hub_models import torch_hub
from distill_datasets_vision.image_files import ImageFiles, ImageMaskFolders
from distill_datasets_vision.models import torchvision_models
from distill_datasets_vision.nested_transforms import RandomApply, RandomChoice, RandomOrder
from distill_datasets_vision.packed import Packed, Packer
from distill_datasets_vision.timm_models import timm
from distill_datasets_vision.transforms import torchvision_transforms
from distill_datasets_vision.tv_tensors import TVTensors

__all__ = [
    "CutMix",
    "Digits",
    "DigitsStudent",
    "DigitsTeacher",
    "ImageFiles",
    "ImageMaskFolders",
    "MixUp",
    "MixUpOrCutMix",
    "Packed",
    "TVTensors",
    "distill_batch_transforms",
    "distill_batched_transforms",
    "distill_dataset_wrappers",
    "distill_datasets",
    "distill_models",
    "distill_packers",
    "distill_presets",
    "distill_transforms",
]


@hookimpl
def distill_datasets() -> Mapping[str, Callable[..., Any]]:
    """``Digits``, folders of images, packed ones, and the data sets of ``torchvision.datasets``."""
    return {
        **torchvision_datasets(),
        "Digits": Digits,
        "ImageFiles": ImageFiles,
        "ImageMaskFolders": ImageMaskFolders,
        "Packed": Packed,
    }


@hookimpl
def distill_dataset_wrappers() -> Mapping[str, Callable[..., Any]]:
    """``TVTensors``: targets that joint transforms change along with the image."""
    return {"TVTensors": TVTensors}


@hookimpl
def distill_transforms() -> Mapping[str, Callable[..., Any]]:
    """The transforms of ``torchvision.transforms.v2`` that can be built from plain data."""
    return {
        **torchvision_transforms(),
        "RandomApply": RandomApply,
        "RandomChoice": RandomChoice,
        "RandomOrder": RandomOrder,
    }


@hookimpl
def distill_batched_transforms() -> Mapping[str, Callable[..., Any]]:
    """Those of torchvision's transforms that have a form for whole batches."""
    return batched_transforms()


@hookimpl
def distill_batch_transforms() -> Mapping[str, Callable[..., Any]]:
    """MixUp, CutMix, and one of both at random."""
    return {"CutMix": CutMix, "MixUp": MixUp, "MixUpOrCutMix": MixUpOrCutMix}


@hookimpl
def distill_models() -> Mapping[str, Callable[..., Any]]:
    """Models of torchvision, the CIFAR literature, timm and PyTorch Hub, and two for ``Digits``.

    ``VisionTransformer`` is torchvision's class, for transformers of other sizes than those named.
    """
    return {
        **torchvision_models(),
        **cifar_models(),
        "DigitsStudent": DigitsStudent,
        "DigitsTeacher": DigitsTeacher,
        "VisionTransformer": VisionTransformer,
        "timm": timm,
        "torch_hub": torch_hub,
    }


@hookimpl
def distill_packers() -> Mapping[str, Callable[..., Any]]:
    """Images as JPEGs or pixels, at the size that they are trained on; ``Packed`` reads them."""
    return {"jpeg": partial(Packer, "jpeg"), "raw": partial(Packer, "raw")}


@hookimpl
def distill_presets() -> Mapping[str, Path]:
    """Experiment files: the teachers and students of the usual benchmarks, trained alone."""
    return {file.stem: file for file in Path(__file__).with_name("presets").glob("*.yaml")}
