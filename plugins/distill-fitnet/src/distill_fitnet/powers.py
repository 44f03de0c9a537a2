"""Powers that features are raised to."""

from __future__ import annotations

import math

from distill.parameters import check


def check_power(owner: object, name: str, power: float, whole: bool = False) -> None:
    """Refuse powers below 1, and fractions where negative numbers are to be raised to them."""
    check(owner, name, power, 1 <= power < math.inf, "a finite number >= 1")
    if whole:
        check(owner, name, power, power % 1 == 0, "whole, since features may be negative")
