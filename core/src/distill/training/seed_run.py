"""What lives through the stages of one seed: models, data, modules that later stages carry on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.config.experiment import Component, Stage
from distill.data.loader import Source
from distill.errors import ConfigError
from distill.observer import StageResult
from distill.training.build import Builder
from distill.training.checkpoint import save_state
from distill.training.evaluation import evaluate
from distill.training.metrics import Metric
from distill.training.stage import REDUCED, Assembly, Parts, assemble

Tell = Callable[[str, Any], None]
"""Tells observers of an event: name of the method, event."""


@dataclass
class SeedRun:
    """What lives through the stages of one seed.

    Attributes:
        directory: where its checkpoint and students go.
        models: by name, each on the device.
        sources: opened data sets by name.
        parts: auxiliary modules and losses that later stages may carry on.
        results: of the stages that are over.
        saved_parts: states of parts from a checkpoint, until the parts are built again.
    """

    builder: Builder
    seed: int
    device: torch.device
    directory: Path
    tell: Tell
    models: dict[str, nn.Module]
    sources: dict[str, Source]
    parts: Parts = field(default_factory=dict)
    results: list[StageResult] = field(default_factory=list)
    saved_parts: dict[str, Any] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)

    @property
    def checkpoint(self) -> Path:
        """The file a stopped run continues from."""
        return self.directory / "checkpoint.pt"

    def assemble(self, stage: Stage) -> Assembly:
        """Put a stage together; parts with a saved state continue from it.

        Raises:
            ConfigError: with everything that keeps it from being put together.
        """
        assembly = assemble(self.builder, stage, self.models, self.parts, self.seed, self.device)
        if assembly.faults:
            raise ConfigError(assembly.faults)
        for key, module in self.parts.items():
            saved = self.saved_parts.pop("|".join(key), None)
            if saved is not None:
                module.load_state_dict(saved)
        return assembly

    def metrics(self, components: Iterable[Component]) -> dict[str, Metric]:
        """Build metrics by the name they are reported under."""
        return {
            _metric_name(component): self.builder.component("metrics", component)
            for component in components
        }

    def save(self, stage: int, epoch: int, more: Mapping[str, Any]) -> None:
        """Write the checkpoint: ``epoch`` epochs of ``stage`` are over."""
        if not distributed.is_main():
            return
        state = {
            "stage": stage,
            "epoch": epoch,
            "models": {name: self.models[name].state_dict() for name in sorted(self.trained)},
            "parts": {"|".join(key): part.state_dict() for key, part in self.parts.items()},
            "results": [vars(result) for result in self.results],
            **more,
        }
        save_state(self.checkpoint, state)


def measure(
    run: SeedRun,
    stage: Stage,
    model: nn.Module,
    dataset: str | None,
    metrics: dict[str, Metric] | None = None,
) -> dict[str, float]:
    """Return the stage's metrics of a model on a data set; nothing without a data set."""
    if dataset is None:
        return {}
    return evaluate(
        model,
        run.sources[dataset],
        run.metrics(stage.metrics) if metrics is None else metrics,
        batch_size=stage.data.batch_size,
        device=run.device,
        seed=run.seed,
        workers=stage.data.workers,
        autocast=REDUCED.get(stage.precision),
    )


def _metric_name(component: Component) -> str:
    params = ", ".join(f"{key}={value}" for key, value in component.params.items())
    return f"{component.type}({params})" if params else component.type
