"""Core's own plugin: what torch brings, by name, and the observers of a run.

It imports the contract only, as a third party's would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill import hookimpl
from distill.builtin.accuracy import accuracy
from distill.builtin.console import Console
from distill.builtin.result_files import ResultFiles
from distill.builtin.tensorboard import TensorBoard
from distill.builtin.torch_components import (
    auxiliary_modules,
    losses,
    optimizers,
    schedulers,
)

Components = Mapping[str, Callable[..., Any]]


@hookimpl
def distill_losses() -> Components:
    """torch's losses, cross entropy wired to student and targets."""
    return losses()


@hookimpl
def distill_auxiliary_modules() -> Components:
    """torch's layers that turn one tensor into another."""
    return auxiliary_modules()


@hookimpl
def distill_optimizers() -> Components:
    """torch's optimizers."""
    return optimizers()


@hookimpl
def distill_schedulers() -> Components:
    """torch's schedulers whose parameters are data."""
    return schedulers()


@hookimpl
def distill_metrics() -> Components:
    """Classification accuracy."""
    return {"accuracy": accuracy}


@hookimpl
def distill_observers() -> Components:
    """Console, TensorBoard and result files."""
    return {"Console": Console, "TensorBoard": TensorBoard, "ResultFiles": ResultFiles}
