"""Parameters of losses: refused with one sentence where out of range, and shown when printed."""

from __future__ import annotations

import inspect
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
