"""Gradients that a loss computes by itself, and that cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Backward = TypeVar("Backward", bound=Callable[..., Any])


def once_differentiable(backward: Backward) -> Backward:
    """Let the backward of a ``torch.autograd.Function`` refuse to be differentiated.

    torch's own decorator refuses only where the incoming gradient is differentiated: with
    ``create_graph=True`` on a loss itself, second derivatives would be 0 without a word.

    Raises:
        RuntimeError: by the backward, where it is asked for with ``create_graph=True``.
    """

    @wraps(backward)
    def only_once(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of this loss cannot be differentiated again: call backward or "
                "torch.autograd.grad without create_graph=True"
            )
        return backward(ctx, *gradients)

    return only_once  # type: ignore[return-value]
