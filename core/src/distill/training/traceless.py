"""Forwards that leave no trace in a module: neither in its buffers nor in its mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give buffers back what they held: running statistics, counters.

    A module with a method ``unchanged`` sees to its own buffers itself, in that context.
    """
    parts = [part for part in module.modules() if not keeps_its_own(part)]
    before = [(part._buffers, dict(part._buffers)) for part in parts]
    values = [(b, b.clone()) for part in parts for b in part.buffers(recurse=False)]
    try:
        with ExitStack() as stack:
            for part in module.modules():
                if keeps_its_own(part):
                    stack.enter_context(part.unchanged())  # type: ignore[operator]
            yield
    finally:
        for buffers, held in before:  # those that a forward made anew or replaced
            buffers.clear()
            buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def keeps_its_own(module: nn.Module) -> bool:
    """Whether a module sees to its buffers itself, which may be large."""
    return hasattr(module, "unchanged")


@contextmanager
def in_eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put every module in eval mode, whatever its ``train`` does, and back."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
