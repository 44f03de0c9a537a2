"""Parameters of losses and modules: refused with one sentence where out of range, and shown."""

from __future__ import annotations

import inspect
import math

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
        raise ValueError(f"{type(owner).__name__}: {name} must be {allowed}, got {value!r}")


def check_choice(owner: object, name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is none of the ``known`` ones."""
    check(owner, name, value, value in known, f"one of {', '.join(map(repr, known))}")


def check_positive(owner: object, name: str, value: float) -> None:
    """Refuse a number that is not finite and above 0."""
    check(owner, name, value, 0 < value < math.inf, "a finite number > 0")
