"""Knowledge distillation losses over logits, for distill."""

from __future__ import annotations

from torch import nn

from distill import hookimpl
from distill_kd.kd import KDLoss

__all__ = ["KDLoss", "distill_losses"]


@hookimpl
def distill_losses() -> dict[str, type[nn.Module]]:
    """Offer this package's losses under the names of their classes."""
    return {"KDLoss": KDLoss}
