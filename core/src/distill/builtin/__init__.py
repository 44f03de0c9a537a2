"""Core's own plugin: what torch brings, by name, and what every experiment may need beside it.

It imports the contract only, as a third party's would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill import hookimpl
from distill.builtin.accuracy import accuracy
from distill.builtin.agreement import agreement
from distill.builtin.batch_transforms import SmoothLabels
from distill.builtin.calibration_error import calibration_error
from distill.builtin.collates import ListCollate, PadCollate
from distill.builtin.console import Console
from distill.builtin.cross_entropy import cross_entropy
from distill.builtin.model_loss import ModelLoss
from distill.builtin.per_class_accuracy import per_class_accuracy
from distill.builtin.redesigners import empty, sequential, whole
from distill.builtin.result_files import ResultFiles
from distill.builtin.samplers import (
    ClassBalancedSampler,
    ClassesPerBatchSampler,
    RandomSampler,
    RepeatedAugmentationSampler,
    SequentialSampler,
)
from distill.builtin.schedulers import WarmupPolynomialLR
from distill.builtin.special_modules import WithTargets
from distill.builtin.subsets import RandomSplit, Subset
from distill.builtin.tensorboard import TensorBoard
from distill.builtin.torch_components import (
    auxiliary_modules,
    losses,
    optimizers,
    schedulers,
)

Components = Mapping[str, Callable[..., Any]]


@hookimpl
def distill_losses() -> Components:
    """torch's losses, cross entropy wired to student and targets, and a model's own."""
    return {**losses(), "ModelLoss": ModelLoss}


@hookimpl
def distill_auxiliary_modules() -> Components:
    """torch's layers that turn one tensor into another."""
    return auxiliary_modules()


@hookimpl
def distill_special_modules() -> Components:
    """Ways to call a model."""
    return {"WithTargets": WithTargets}


@hookimpl
def distill_model_redesigners() -> Components:
    """Forms of a model."""
    return {"empty": empty, "sequential": sequential, "whole": whole}


@hookimpl
def distill_dataset_wrappers() -> Components:
    """Parts of data sets."""
    return {"RandomSplit": RandomSplit, "Subset": Subset}


@hookimpl
def distill_samplers() -> Components:
    """In order, at random, with repeats, balanced over classes."""
    return {
        "ClassBalancedSampler": ClassBalancedSampler,
        "RandomSampler": RandomSampler,
        "RepeatedAugmentationSampler": RepeatedAugmentationSampler,
        "SequentialSampler": SequentialSampler,
    }


@hookimpl
def distill_batch_samplers() -> Components:
    """Batches of a few classes."""
    return {"ClassesPerBatchSampler": ClassesPerBatchSampler}


@hookimpl
def distill_collates() -> Components:
    """For samples of different sizes."""
    return {"ListCollate": ListCollate, "PadCollate": PadCollate}


@hookimpl
def distill_batch_transforms() -> Components:
    """Label smoothing."""
    return {"SmoothLabels": SmoothLabels}


@hookimpl
def distill_optimizers() -> Components:
    """torch's optimizers."""
    return optimizers()


@hookimpl
def distill_schedulers() -> Components:
    """torch's schedulers whose parameters are data, and a warm-up with polynomial decay."""
    return {**schedulers(), "WarmupPolynomialLR": WarmupPolynomialLR}


@hookimpl
def distill_metrics() -> Components:
    """Of classification: accuracy, calibration, cross entropy, agreement with a teacher."""
    return {
        "accuracy": accuracy,
        "agreement": agreement,
        "calibration_error": calibration_error,
        "cross_entropy": cross_entropy,
        "per_class_accuracy": per_class_accuracy,
    }


@hookimpl
def distill_observers() -> Components:
    """Console, TensorBoard and result files."""
    return {"Console": Console, "TensorBoard": TensorBoard, "ResultFiles": ResultFiles}
