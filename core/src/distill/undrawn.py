"""Models on the meta device without drawing initial values, for which there is no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Leaves out normal numbers on the meta device.

    Other numbers cost nothing there. For these torch imports its compiler and sympy, which takes
    longer than all else there is to check.
    """

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ and args[0].is_meta and _is_allowed(*args[1:], **kwargs):
            return args[0]
        return func(*args, **kwargs)


def _is_allowed(mean: float = 0, std: float = 1, **_others: Any) -> bool:
    return std >= 0
