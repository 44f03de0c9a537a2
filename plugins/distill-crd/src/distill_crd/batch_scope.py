"""Whose samples a loss relates to each other: those of this process, or of all."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill import gather

Scope = Literal["none", "all"]
"""``none``: the samples of this process; ``all``: of the global batch, over all processes."""
SCOPES: tuple[str, ...] = ("none", "all")


def rows_in_scope(tensor: Tensor, scope: Scope) -> Tensor:
    """Return the rows that a loss is to see, with gradients to whichever process they are of."""
    return gather(tensor) if scope == "all" else tensor
