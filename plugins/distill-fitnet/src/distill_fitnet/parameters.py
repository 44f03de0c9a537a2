"""Parameters of losses and modules: refused with one sentence where they are out of range."""

from __future__ import annotations

from typing import Any


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
