"""Build torchvision's models on the meta device: the architecture, no weights, no download.

With pretrained weights torchvision builds another architecture than without (number of classes,
auxiliary heads, image size, ...), so leaving the weights out would give wrong module paths. Here
the builder runs as always, only fetching and loading do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum  # type: ignore[attr-defined]


@contextmanager
def architecture_only(model: str, *, quantize: bool) -> Iterator[None]:
    """Let the builder of ``model`` run without its weights where the meta device is the default.

    Args:
        model: name of the model.
        quantize: the model is to be quantized, which reads values: it is built on the CPU.
    """
    with (
        _doing_nothing(WeightsEnum, "get_state_dict", {}),
        _doing_nothing(nn.Module, "load_state_dict", None),
        torch.device("cpu") if quantize else nullcontext(),
        _SizesOnCPU() if model.startswith("regnet") else nullcontext(),
    ):
        yield


class _SizesOnCPU(TorchFunctionMode):
    """RegNet computes its layer sizes with tensors, whose values the meta device has not."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange or (func is torch.tensor and isinstance(args[0], list)):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def _doing_nothing(owner: type, name: str, result: Any) -> Iterator[None]:
    """Replace a method by one that returns ``result``, for this thread and the time being."""
    original, thread = getattr(owner, name), threading.get_ident()

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args, **kwargs)
        return result

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
