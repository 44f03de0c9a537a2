"""Modules that find their shapes in what they are fed: built from the values of two samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill import randomness
from distill.data.batch import Batch
from distill.data.source import Source
from distill.model.distiller import Distiller
from distill.model.wiring import CallError
from distill.training.parts import Parts
from distill.training.traceless import buffers_kept


def set_up(distiller: Distiller, parts: Parts, source: Source, batch: Batch, seed: int) -> None:
    """Let every module that is still to find its shapes build its layers.

    Their initial weights depend on the seed and on the module's name alone. A ``setup`` that has a
    parameter ``dataset`` is given the stage's training data.

    Raises:
        CallError: if a module fails on what it is given, or knows the samples of other data.
    """
    calls = distiller.calls()
    for call in calls:
        _check_data(call.module, parts, source)
    if not any(parts.is_unset(call.module) for call in calls):
        return
    losses = distiller.criterion.calls
    with torch.no_grad():
        with buffers_kept(distiller):
            values = distiller.values_of_models(batch)
        for call in calls:
            if parts.is_unset(call.module):
                knows_data = "dataset" in inspect.signature(call.module.setup).parameters  # type: ignore[arg-type]
                if knows_data:
                    parts.data[parts.key(call.module)] = source.name
                with _seeded(call.module, parts, seed):
                    call.set_up(values, {"dataset": source.dataset} if knows_data else {})
            if call not in losses:
                with buffers_kept(call.module):
                    distiller.run_auxiliary(call, values)


def _check_data(module: nn.Module, parts: Parts, source: Source) -> None:
    """Refuse a module that was set up with other data than the stage trains on."""
    for key, known in parts.data.items():
        if parts.modules[key] is module and known != source.name:
            raise CallError(
                module,
                f"{type(module).__name__} knows the samples of data set '{known}' by their index, "
                f"and this stage trains on '{source.name}'; let the stage write its own criterion",
            )


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
