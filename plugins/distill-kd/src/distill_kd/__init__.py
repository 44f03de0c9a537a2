"""Knowledge distillation losses over logits, for distill."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from distill import hookimpl
from distill_kd.dist import DISTLoss
from distill_kd.kd import KDLoss

__all__ = ["DISTLoss", "KDLoss", "distill_losses", "distill_presets"]


@hookimpl
def distill_losses() -> dict[str, type[nn.Module]]:
    """Offer this package's losses under the names of their classes."""
    return {kind.__name__: kind for kind in (DISTLoss, KDLoss)}


@hookimpl
def distill_presets() -> dict[str, Path]:
    """Offer this package's experiment files under the names of the files."""
    return {file.stem: file for file in Path(__file__).with_name("presets").glob("*.yaml")}
