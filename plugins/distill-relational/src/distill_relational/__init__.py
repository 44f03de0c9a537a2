"""Distillation of relations between samples, channels and layers, for distill."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from distill import hookimpl
from distill_relational.correlation_congruence import CCKDEmbedding, CCKDLoss
from distill_relational.inter_channel import ICKDEmbedding, ICKDLoss
from distill_relational.probabilistic_transfer import PKTLoss
from distill_relational.relational_knowledge import (
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
)
from distill_relational.similarity_preserving import SPKDLoss
from distill_relational.solution_flow import FSPLoss

LOSSES: tuple[type[nn.Module], ...] = (
    CCKDLoss,
    FSPLoss,
    ICKDLoss,
    PKTLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    SPKDLoss,
)
AUXILIARY_MODULES: tuple[type[nn.Module], ...] = (CCKDEmbedding, ICKDEmbedding)

__all__ = [
    "CCKDEmbedding",
    "CCKDLoss",
    "FSPLoss",
    "ICKDEmbedding",
    "ICKDLoss",
    "PKTLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "SPKDLoss",
    "distill_auxiliary_modules",
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
def distill_presets() -> dict[str, Path]:
    """Offer this package's experiment files under the names of the files."""
    return {file.stem: file for file in Path(__file__).with_name("presets").glob("*.yaml")}
