"""Knowledge distillation losses over logits, for distill."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from distill import hookimpl
from distill_kd.ctkd import CTKDLoss
from distill_kd.dist import DISTLoss
from distill_kd.dkd import DKDLoss
from distill_kd.dot import DOT
from distill_kd.jensen_shannon import JensenShannonLoss
from distill_kd.kd import KDLoss
from distill_kd.l2 import LogitL2Loss
from distill_kd.mlkd import MLKDLoss
from distill_kd.multi_teacher import MultiTeacherKDLoss
from distill_kd.nkd import NKDLoss
from distill_kd.skd import SKDLoss
from distill_kd.tf_kd import VirtualTeacherLoss
from distill_kd.uskd import USKDHead, USKDLoss
from distill_kd.wsld import WSLDLoss

LOSSES: tuple[type[nn.Module], ...] = (
    CTKDLoss,
    DISTLoss,
    DKDLoss,
    JensenShannonLoss,
    KDLoss,
    LogitL2Loss,
    MLKDLoss,
    MultiTeacherKDLoss,
    NKDLoss,
    SKDLoss,
    USKDLoss,
    VirtualTeacherLoss,
    WSLDLoss,
)

__all__ = [
    "DOT",
    "CTKDLoss",
    "DISTLoss",
    "DKDLoss",
    "JensenShannonLoss",
    "KDLoss",
    "LogitL2Loss",
    "MLKDLoss",
    "MultiTeacherKDLoss",
    "NKDLoss",
    "SKDLoss",
    "USKDHead",
    "USKDLoss",
    "VirtualTeacherLoss",
    "WSLDLoss",
    "distill_auxiliary_modules",
    "distill_losses",
    "distill_optimizers",
    "distill_presets",
]


@hookimpl
def distill_losses() -> dict[str, type[nn.Module]]:
    """Offer this package's losses under the names of their classes."""
    return {loss.__name__: loss for loss in LOSSES}


@hookimpl
def distill_auxiliary_modules() -> dict[str, type[nn.Module]]:
    """Offer the head that gives USKD its weak logits."""
    return {"USKDHead": USKDHead}


@hookimpl
def distill_optimizers() -> dict[str, type[Optimizer]]:
    """Offer the optimizer that follows task and distillation with momenta of their own."""
    return {"DOT": DOT}


@hookimpl
def distill_presets() -> dict[str, Path]:
    """Offer this package's experiment files under the names of the files."""
    return {file.stem: file for file in Path(__file__).with_name("presets").glob("*.yaml")}
