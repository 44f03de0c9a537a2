"""How a store keeps what a teacher gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Encoding = Literal["float16", "float32", "int8", "top_k"]
"""How floating-point numbers are kept; see ``distill.store.encoding``."""
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


@dataclass(frozen=True)
class Store:
    """How a teacher's outputs are kept.

    Attributes:
        encoding: of floating-point values; ``top_k`` is for logits, features beside them are kept
            in float16.
        top: with ``top_k``, logits kept a sample.
        temperature: with ``top_k``, the one at which the mass of the others is kept.
    """

    encoding: Encoding = "float16"
    top: int = 12
    temperature: float = 1.0
