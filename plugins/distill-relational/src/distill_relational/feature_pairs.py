"""Maps of student and teacher, of one layer or of several, made ready to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Features = Tensor | Sequence[Tensor]
"""One feature, or one for each of several layers."""


def as_list(features: Features) -> list[Tensor]:
    """Return features as a list, whether one or several were given."""
    return [features] if isinstance(features, Tensor) else list(features)


def in_layers(owner: object, **features: Features) -> list[tuple[Tensor, ...]]:
    """Return what belongs to each layer, from features by the name under which they were given.

    Raises:
        ValueError: if there are not as many of each, none at all, or some that are no maps.
    """
    listed = {name: as_list(given) for name, given in features.items()}
    kind, counts = type(owner).__name__, {name: len(given) for name, given in listed.items()}
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(f"{kind}: as many features of each are needed, got {numbers}")
    if not all(counts.values()):
        raise ValueError(f"{kind}: features of one layer at least are needed, got none")
    for name, given in listed.items():
        for feature in given:
            if feature.ndim != 4:
                raise ValueError(
                    f"{kind}: {name} must be maps (B, C, H, W), got {tuple(feature.shape)}; "
                    "capture them before they are pooled and flattened"
                )
    return list(zip(*listed.values(), strict=True))


def sum_over_layers(
    owner: object, losses: Sequence[Tensor], layer_weights: Sequence[float] | None
) -> Tensor:
    """Return the sum of the layers' losses, each times its weight.

    Raises:
        ValueError: if there are not as many weights as layers.
    """
    if layer_weights is not None:
        if len(layer_weights) != len(losses):
            raise ValueError(
                f"{type(owner).__name__}: layer_weights has {len(layer_weights)} numbers for "
                f"{len(losses)} layers"
            )
        losses = [weight * loss for weight, loss in zip(layer_weights, losses, strict=True)]
    return torch.stack(list(losses)).sum()
