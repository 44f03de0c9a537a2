"""Contrastive and self-supervised distillation methods, for distill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from distill import hookimpl
from distill_crd.contrastive import CRDLoss
from distill_crd.embedding import CRDEmbedding
from distill_crd.rotations import Rotations
from distill_crd.self_supervision import SelfSupervisionLoss, SSKDHead
from distill_crd.sskd import SSKDLoss, SSKDSimilarityLoss, SSKDTransformedLoss
from distill_crd.view_rows import SplitViews

LOSSES: tuple[type[nn.Module], ...] = (
    CRDLoss,
    SSKDLoss,
    SSKDSimilarityLoss,
    SSKDTransformedLoss,
    SelfSupervisionLoss,
)
AUXILIARY_MODULES: tuple[type[nn.Module], ...] = (
    CRDEmbedding,
    SSKDHead,
    SplitViews,
)
WRAPPERS: tuple[Callable[..., Any], ...] = (Rotations,)

__all__ = [
    "CRDEmbedding",
    "CRDLoss",
    "Rotations",
    "SSKDHead",
    "SSKDLoss",
    "SSKDSimilarityLoss",
    "SSKDTransformedLoss",
    "SelfSupervisionLoss",
    "SplitViews",
    "distill_auxiliary_modules",
    "distill_dataset_wrappers",
    "distill_losses",
    "distill_presets",
]


@hookimpl
def distill_losses() -> dict[str, type[nn.Module]]:
    """Offer this package's losses under the names of their classes."""
    return {loss.__name__: loss for loss in LOSSES}


@hookimpl
def distill_auxiliary_modules() -> dict[str, type[nn.Module]]:
    """Offer this package's auxiliary modules under the names of their classes."""
    return {module.__name__: module for module in AUXILIARY_MODULES}


@hookimpl
def distill_dataset_wrappers() -> dict[str, Callable[..., Any]]:
    """Offer this package's dataset wrappers under the names of their classes."""
    return {wrapper.__name__: wrapper for wrapper in WRAPPERS}


@hookimpl
def distill_presets() -> dict[str, Path]:
    """Offer this package's experiment files under the names of the files."""
    return {file.stem: file for file in Path(__file__).with_name("presets").glob("*.yaml")}
