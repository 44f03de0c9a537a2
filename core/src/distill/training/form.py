"""How models lie in memory and are called while a stage runs: channels last, compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
def compiled(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let torch compile models in place: names of parameters and submodules stay as they are."""
    models = list(models)
    for model in models:
        model.compile()
    try:
        yield
    finally:
        for model in models:
            model._compiled_call_impl = None
