"""Models in reduced precision, and what they give in float32 for losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from distill.data.batch import map_tensors
from distill.model.wiring import Values


class Precision:
    """What models run in.

    Args:
        autocast: device type and reduced precision, or ``None``.
        parameters: of all that runs, some of which may be of reduced precision themselves.
    """

    def __init__(
        self, autocast: tuple[str, torch.dtype] | None, parameters: Iterable[torch.Tensor]
    ):
        self._autocast = autocast
        self._is_reduced = autocast is not None or any(map(_is_reduced, parameters))

    def __call__(self, function: Callable[[], Values]) -> Values:
        """Return what a function gives that runs models, in float32."""
        if not self._is_reduced:
            return function()
        device_type, dtype = self._autocast or ("cpu", None)
        with torch.autocast(device_type, dtype, enabled=self._autocast is not None):
            return to_float32(function())  # type: ignore[no-any-return]


def to_float32(value: Any) -> Any:
    """Return ``value`` with every tensor of reduced precision as float32."""
    return map_tensors(_widen, value)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if _is_reduced(tensor) else tensor


def _is_reduced(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
