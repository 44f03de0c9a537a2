"""distill: knowledge distillation in PyTorch, configured in one file, extended by plugins.

This page is the whole contract for plugin authors and Python users; everything else may move.

Plugin authors: ``hookimpl``, ``Sample``, ``Views`` of one, ``Batch``, ``labels`` of a data set,
``gather`` for losses on the batch of all processes, ``claim`` before much memory is taken,
``once_differentiable`` for gradients of one's own,
``Metric``, ``Observer`` and the events it is told of, ``DistillError`` and its kinds.
Python users: ``load`` an experiment, ``check`` it, ``run`` it; ``plugins`` gives the registry to
create any component by name; ``Capture`` records features of any module of any model.
Three modules belong to it too: ``distill.parameters`` checks those of a component,
``distill.testing`` and ``distill.golden`` test a plugin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill.errors import (
    ConfigError,
    DataError,
    DistillError,
    NumericalError,
    PluginError,
    StorageError,
)
from distill.hookspecs import hookimpl

# At once: found on first use, the function would give way to the module of its name.
from distill.plugins import plugins

if TYPE_CHECKING:
    from distill.config.load import load as load
    from distill.data.batch import Batch as Batch
    from distill.data.batch import Sample as Sample
    from distill.data.batch import Views as Views
    from distill.data.labels import labels as labels
    from distill.derivatives import once_differentiable as once_differentiable
    from distill.experiment_check import check as check
    from distill.global_batch import gather as gather
    from distill.memory import claim as claim
    from distill.model.capture import Capture as Capture
    from distill.observer import ControlsEnd as ControlsEnd
    from distill.observer import EpochEnd as EpochEnd
    from distill.observer import EvaluationEnd as EvaluationEnd
    from distill.observer import Observer as Observer
    from distill.observer import RunEnd as RunEnd
    from distill.observer import RunStart as RunStart
    from distill.observer import StageEnd as StageEnd
    from distill.observer import StageStart as StageStart
    from distill.observer import StepEnd as StepEnd
    from distill.runner import run as run
    from distill.training.metrics import Metric as Metric

# Found on first use, so that `distill --help` does not wait for torch.
_LAZY = {
    "Batch": "distill.data.batch",
    "Capture": "distill.model.capture",
    "ControlsEnd": "distill.observer",
    "EpochEnd": "distill.observer",
    "EvaluationEnd": "distill.observer",
    "Metric": "distill.training.metrics",
    "Observer": "distill.observer",
    "RunEnd": "distill.observer",
    "RunStart": "distill.observer",
    "Sample": "distill.data.batch",
    "StageEnd": "distill.observer",
    "StageStart": "distill.observer",
    "StepEnd": "distill.observer",
    "Views": "distill.data.batch",
    "check": "distill.experiment_check",
    "claim": "distill.memory",
    "gather": "distill.global_batch",
    "labels": "distill.data.labels",
    "load": "distill.config.load",
    "once_differentiable": "distill.derivatives",
    "run": "distill.runner",
}

__all__ = [
    "Batch",
    "Capture",
    "ConfigError",
    "ControlsEnd",
    "DataError",
    "DistillError",
    "EpochEnd",
    "EvaluationEnd",
    "Metric",
    "NumericalError",
    "Observer",
    "PluginError",
    "RunEnd",
    "RunStart",
    "Sample",
    "StageEnd",
    "StageStart",
    "StepEnd",
    "StorageError",
    "Views",
    "check",
    "claim",
    "gather",
    "hookimpl",
    "labels",
    "load",
    "once_differentiable",
    "plugins",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
