"""A model as its code draws it: a teacher that knows nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from distill.config.experiment import Component

TRAINED_WEIGHTS = {
    "weights": None,
    "weights_backbone": None,
    "pretrained": False,
    "pretrained_backbone": False,
}
"""Parameters by which models of the usual libraries ask for trained weights, and their opposite."""


def untrained(component: Component) -> Component:
    """Return a model's description without the parameters that ask for trained weights."""
    params = {
        key: TRAINED_WEIGHTS[key] if value and key in TRAINED_WEIGHTS else value
        for key, value in component.params.items()
    }
    return replace(component, params=params)


def is_drawn(one: nn.Module, other: nn.Module) -> bool:
    """Whether a model's weights are drawn: two of them agree in less than half of what varies."""
    same = varying = 0
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        if a.numel() == 0 or (a == a.reshape(-1)[0]).all():  # a scale or a shift begins so
            continue
        varying += a.numel()
        same += a.numel() if torch.equal(a, b) else 0
    return 2 * same <= varying
