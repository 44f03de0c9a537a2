"""Feature and hint distillation methods, for distill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from distill import hookimpl
from distill_fitnet.activation_boundaries import ABConnector, ABLoss
from distill_fitnet.attention_transfer import ATLoss
from distill_fitnet.channel_wise import CWDLoss
from distill_fitnet.dist_plus import DISTPlusFeatureLoss
from distill_fitnet.factor_transfer import FTLoss, Paraphraser, Translator
from distill_fitnet.feature_overhaul import OFDConnector, OFDLoss
from distill_fitnet.fitnet import ConvRegressor, HintLoss
from distill_fitnet.head_distillation import HNDLoss, bottlenecked
from distill_fitnet.knowledge_adaptation import (
    AffinityLoss,
    CodeNormLoss,
    KTAAdapter,
    KTALoss,
)
from distill_fitnet.knowledge_review import HCLLoss, ReviewFusion
from distill_fitnet.masked_generation import MGDGenerator, MGDLoss
from distill_fitnet.neuron_selectivity import NSTLoss
from distill_fitnet.prime_aware import PADLoss, PADVariance
from distill_fitnet.simple_recipe import SRDLoss, SRDProjector
from distill_fitnet.singular_values import KDSVDLoss
from distill_fitnet.softmax_regression import SRRLConnector, SRRLLoss
from distill_fitnet.variational_information import VIDLoss, VIDRegressor
from distill_fitnet.vit_features import ViTKDGenerator, ViTKDLoss, ViTKDMimic

LOSSES: tuple[type[nn.Module], ...] = (
    ABLoss,
    ATLoss,
    AffinityLoss,
    CWDLoss,
    CodeNormLoss,
    DISTPlusFeatureLoss,
    FTLoss,
    HCLLoss,
    HNDLoss,
    HintLoss,
    KDSVDLoss,
    KTALoss,
    MGDLoss,
    NSTLoss,
    OFDLoss,
    PADLoss,
    SRDLoss,
    SRRLLoss,
    VIDLoss,
    ViTKDLoss,
)
AUXILIARY_MODULES: tuple[type[nn.Module], ...] = (
    ABConnector,
    ConvRegressor,
    KTAAdapter,
    MGDGenerator,
    OFDConnector,
    PADVariance,
    Paraphraser,
    ReviewFusion,
    SRDProjector,
    SRRLConnector,
    Translator,
    VIDRegressor,
    ViTKDGenerator,
    ViTKDMimic,
)

__all__ = [
    "ABConnector",
    "ABLoss",
    "ATLoss",
    "AffinityLoss",
    "CWDLoss",
    "CodeNormLoss",
    "ConvRegressor",
    "DISTPlusFeatureLoss",
    "FTLoss",
    "HCLLoss",
    "HNDLoss",
    "HintLoss",
    "KDSVDLoss",
    "KTAAdapter",
    "KTALoss",
    "MGDGenerator",
    "MGDLoss",
    "NSTLoss",
    "OFDConnector",
    "OFDLoss",
    "PADLoss",
    "PADVariance",
    "Paraphraser",
    "ReviewFusion",
    "SRDLoss",
    "SRDProjector",
    "SRRLConnector",
    "SRRLLoss",
    "Translator",
    "VIDLoss",
    "VIDRegressor",
    "ViTKDGenerator",
    "ViTKDLoss",
    "ViTKDMimic",
    "bottlenecked",
    "distill_auxiliary_modules",
    "distill_losses",
    "distill_model_redesigners",
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
def distill_model_redesigners() -> dict[str, Callable[..., nn.Module]]:
    """Offer the redesigner that puts a bottleneck into a model."""
    return {"bottlenecked": bottlenecked}


@hookimpl
def distill_presets() -> dict[str, Path]:
    """Offer this package's experiment files under the names of the files."""
    return {file.stem: file for file in Path(__file__).with_name("presets").glob("*.yaml")}
