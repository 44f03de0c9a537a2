"""What stands in for a teacher's plain forward: its stored outputs, or a faster form of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from distill.store_settings import Store


@dataclass(frozen=True)
class Fast:
    """What is done to a frozen teacher to make its forward faster.

    Attributes:
        fold_batchnorm: whether BatchNorm becomes part of the convolution before it.
        channels_last: whether weights and images lie in memory with their channels last.
        precision: of its weights and features; what is read of it is float32.
        compile: whether torch compiles it.
        device: where it runs; ``None`` for where the student does.
    """

    fold_batchnorm: bool = False
    channels_last: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    device: str | None = None


ALL_FAST = Fast(fold_batchnorm=True, channels_last=True, precision="bf16")


def store(given: bool | Mapping[str, Any] | None) -> Store | None:
    """Read the key ``store``."""
    if not given and not isinstance(given, Mapping):
        return None
    return Store() if given is True else Store(**given)


def fast(given: bool | Mapping[str, Any] | None) -> Fast | None:
    """Read the key ``fast``: ``true`` is all that costs no preparation, a mapping its parts."""
    if not given and not isinstance(given, Mapping):
        return None
    return ALL_FAST if given is True else replace(Fast(), **given)
