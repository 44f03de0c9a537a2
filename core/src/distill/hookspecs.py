"""The hooks a plugin may implement: each takes nothing and returns ``name -> factory``.

The name in the experiment file is the name of the Python object. Returning a mapping has no side
effect, so a plugin's offer can be tested by comparing a dict. Parameters from the file are checked
against the factory's signature and type hints before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy

PROJECT = "distill"
"""Name of the pluggy project and of the entry-point group plugins register in."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Factory = Callable[..., Any]
Components = Mapping[str, Factory]


@hookspec
def distill_losses() -> Components:  # type: ignore[empty-body]
    """Terms of a criterion: ``(**params) -> nn.Module``; ``forward(<named tensors>) -> scalar``.

    The parameter names of ``forward`` are wired to references; ``student``, ``teacher`` and
    ``targets`` are wired by themselves.
    """


@hookspec
def distill_auxiliary_modules() -> Components:  # type: ignore[empty-body]
    """Modules fed from a model's features and trained with the student.

    ``(**params) -> nn.Module``; ``forward(<named tensors>) -> tensor or {name: tensor}``.
    """


@hookspec
def distill_datasets() -> Components:  # type: ignore[empty-body]
    """Data sets: ``(**params) -> Dataset`` whose items are ``(input, target)`` or ``Sample``."""


@hookspec
def distill_transforms() -> Components:  # type: ignore[empty-body]
    """Transforms of a sample's input: ``(**params) -> callable(input) -> input``."""


@hookspec
def distill_models() -> Components:  # type: ignore[empty-body]
    """Models: ``(**params) -> nn.Module``.

    The factory is also called under ``torch.device("meta")``, to learn a model's module paths
    without its memory: do not read or download weights there.
    """


@hookspec
def distill_metrics() -> Components:  # type: ignore[empty-body]
    """Metrics of an evaluation: ``(**params) -> Metric`` (update, state, merge, compute, reset)."""


@hookspec
def distill_optimizers() -> Components:  # type: ignore[empty-body]
    """Optimizers: ``(params, **params) -> torch.optim.Optimizer``."""


@hookspec
def distill_schedulers() -> Components:  # type: ignore[empty-body]
    """Learning-rate schedulers, stepped once an epoch: ``(optimizer, **params) -> scheduler``."""


@hookspec
def distill_observers() -> Components:  # type: ignore[empty-body]
    """Observers of a run: ``(**params) -> Observer``, told of run, stage, epoch and step."""
