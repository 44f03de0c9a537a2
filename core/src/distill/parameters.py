"""Parameters of losses and modules: refused with one sentence where out of range, and shown.

For plugins, whose components then speak alike.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from torch import nn


class Parametrized(nn.Module):
    """A module that keeps its constructor's parameters under their names, and prints them."""

    def extra_repr(self) -> str:
        """Return the parameters as ``print`` shows them."""
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def check(owner: object, name: str, value: object, fits: bool, allowed: str) -> None:
    """Refuse a parameter's value unless it fits.

    Raises:
        ValueError: naming the owner's class, the parameter, what is allowed and what was given.
    """
    if not fits:
        kind = type(owner).__name__
        raise ValueError(f"{kind}: {name} must be {allowed}, got {value!r}")


def check_choice(owner: object, name: str, value: str, known: tuple[Any, ...]) -> None:
    """Refuse a value that is none of the ``known`` ones."""
    check(owner, name, value, value in known, f"one of {', '.join(map(repr, known))}")


def check_positive(owner: object, name: str, value: float) -> None:
    """Refuse a number that is not finite and above 0."""
    check(owner, name, value, 0 < value < math.inf, "a finite number > 0")


def check_factor(owner: object, name: str, factor: float) -> None:
    """Refuse a weight that is not a finite number from 0 on."""
    check(owner, name, factor, 0 <= factor < math.inf, "a finite number >= 0")


def check_layer_weights(owner: object, layer_weights: Sequence[float] | None) -> None:
    """Refuse layer weights that are negative or not finite."""
    fits = layer_weights is None or all(0 <= weight < math.inf for weight in layer_weights)
    allowed = "finite numbers >= 0, one for each layer, or None"
    check(owner, "layer_weights", layer_weights, fits, allowed)


def check_channels(owner: object, name: str, channels: int | None) -> None:
    """Refuse a number of channels below 1."""
    fits = channels is None or channels >= 1
    check(owner, name, channels, fits, "a whole number >= 1, or None")
