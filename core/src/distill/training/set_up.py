"""Modules that find their shapes in what they are fed: built from the values of two samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill import randomness
from distill.data.batch import Batch
from distill.model.distiller import Distiller
from distill.training.parts import Parts
from distill.training.traceless import buffers_kept


def set_up(distiller: Distiller, parts: Parts, batch: Batch, seed: int) -> None:
    """Let every module that is still to find its shapes build its layers.

    Their initial weights depend on the seed and on the module's name alone.

    Raises:
        CallError: if a module fails on what it is given.
    """
    calls = distiller.calls()
    if not any(parts.is_unset(call.module) for call in calls):
        return
    losses = distiller.criterion.calls
    with torch.no_grad():
        with buffers_kept(distiller):
            values = distiller.values_of_models(batch)
        for call in calls:
            if parts.is_unset(call.module):
                with _seeded(call.module, parts, seed):
                    call.set_up(values)
            if call not in losses:
                with buffers_kept(call.module):
                    values[call.name] = call(values)


@contextmanager
def set_up_when_called(modules: Iterable[nn.Module], parts: Parts, seed: int) -> Iterator[None]:
    """Let modules that a model calls itself build their layers when it first does."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if parts.is_unset(module):
            with _seeded(module, parts, seed):
                module.setup(*args)  # type: ignore[operator]

    handles = [module.register_forward_pre_hook(before) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _seeded(module: nn.Module, parts: Parts, seed: int) -> Iterator[None]:
    key = parts.key(module)
    with randomness.seeded(seed, *key, "shapes"):
        yield
    parts.unset.remove(key)
