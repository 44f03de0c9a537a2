"""How models lie in memory and are called while a stage runs: channels last, compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._functorch import config


@contextmanager
def channels_last(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let the weights of convolutions lie with their channels last."""
    models = list(models)
    for model in models:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for model in models:
            model.to(memory_format=torch.contiguous_format)


@contextmanager
def compiled(models: Iterable[nn.Module], *, keeps_graph: bool = False) -> Iterator[None]:
    """Let torch compile models in place: names of parameters and submodules stay as they are.

    Args:
        models: in place.
        keeps_graph: whether gradients are taken through them several times a forward, for which the
            backward must not overwrite what the forward has left.
    """
    models = list(models)
    for model in models:
        model.compile()
    try:
        with config.patch(donated_buffer=False) if keeps_graph else nullcontext():
            yield
    finally:
        for model in models:
            model._compiled_call_impl = None
