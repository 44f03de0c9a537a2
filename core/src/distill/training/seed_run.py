"""What lives through the stages of one seed: models, data, modules that later stages carry on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.config.experiment import Metric as MetricEntry
from distill.config.experiment import Stage
from distill.data.batch import Batch
from distill.data.kept import Kept
from distill.data.loader import Loading, sample_batch
from distill.data.mixing import Mixing
from distill.data.plan import Plan
from distill.data.source import Source
from distill.errors import ConfigError
from distill.observer import StageResult
from distill.training.average import Average
from distill.training.build import Builder
from distill.training.checkpoint import save_state
from distill.training.form import channels_last
from distill.training.metrics import Metric, compares_with
from distill.training.parts import Parts
from distill.training.sharding import is_sharded
from distill.training.stage import Assembly, assemble

Tell = Callable[[str, Any], None]
"""Tells observers of an event: name of the method, event."""


@dataclass
class SeedRun:
    """What lives through the stages of one seed.

    Attributes:
        directory: where its checkpoint and students go.
        models: by name, until the last stage that runs them; those of the stage under way are where
            it runs them.
        sources: opened data sets by name.
        parts: auxiliary modules and losses that later stages may carry on.
        results: of the stages that are over.
        trained: names of models that checkpoints have to have.
        unloaded: names of models that are on the meta device, until ``load``.
        profiles: whether every part of a step is timed.
        kept: data sets in memory by name.
    """

    builder: Builder
    seed: int
    device: torch.device
    directory: Path
    tell: Tell
    models: dict[str, nn.Module]
    sources: dict[str, Source]
    parts: Parts = field(default_factory=Parts)
    results: list[StageResult] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    unloaded: set[str] = field(default_factory=set)
    profiles: bool = False
    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """The file a stopped run continues from."""
        return self.directory / "checkpoint.pt"

    def data(self, name: str) -> Source:
        """Return a data set, in memory if it is kept there."""
        return self.kept.get(name) or self.sources[name]

    def place(self, stage: Stage) -> torch.device:
        """Put a stage's models where it runs them, and return where; to be sharded, on the CPU."""
        device = torch.device("cpu") if is_sharded(stage) else self.device
        for model in self.present(stage):
            model.to(device)
        self.parts.to(device)
        return device

    def present(self, stage: Stage) -> list[nn.Module]:
        """Return the models of a stage that are in memory."""
        return [self.models[name] for name in stage.models if name not in self.unloaded]

    def load(self, name: str) -> nn.Module:
        """Bring a model into memory that was left out of it."""
        self.models[name] = self.builder.model(name, self.seed)
        self.unloaded.discard(name)
        return self.models[name]

    def let_go(self, stages: Iterable[Stage]) -> None:
        """Forget the models that none of the stages to come runs; nothing saves them any more."""
        needed = {name for stage in stages for name in stage.models}
        self.models = {name: model for name, model in self.models.items() if name in needed}
        self.trained &= needed
        self.unloaded &= needed

    def assemble(self, stage: Stage, absent: Collection[str] = ()) -> Assembly:
        """Put a stage together; teachers in the roles ``absent`` stay out of memory.

        Raises:
            ConfigError: with everything that keeps it from being put together.
        """
        device, models, parts = self.place(stage), self.models, self.parts
        assembly = assemble(self.builder, stage, models, parts, self.seed, device, absent)
        if assembly.faults:
            raise ConfigError(assembly.faults)
        return assembly

    def average(self, stage: Stage, model: nn.Module) -> Average | None:
        """Return the average that follows ``model``, if the stage wants one."""
        if stage.ema is None:
            return None
        followed = copy.deepcopy(model)
        return Average(followed, stage.ema)

    def metrics(
        self, entries: Iterable[MetricEntry], teachers: Iterable[str] = ()
    ) -> dict[str, Metric]:
        """Build metrics by name, less those that compare with a teacher there is not."""
        built = {
            entry.name: self.builder.component("metrics", entry.component) for entry in entries
        }
        roles = {None, *teachers}
        return {name: metric for name, metric in built.items() if compares_with(metric) in roles}

    def plan(self, stage: Stage) -> Plan:
        """Return which samples come in which batch of the stage."""
        data = stage.data
        dataset = self.sources[data.train].dataset
        sampler = batch_sampler = None
        if data.sampler is not None:
            sampler = self.builder.component("samplers", data.sampler, dataset)
        if data.batch_sampler is not None:
            batch_sampler = self.builder.component(
                "batch_samplers", data.batch_sampler, dataset, data.batch_size
            )
        for component, made in ((data.sampler, sampler), (data.batch_sampler, batch_sampler)):
            if component is not None and not hasattr(made, "__len__"):
                text = f"{component.type} has no length, which schedules and processes count on"
                raise self.builder.experiment.error(component.path, text)
        return Plan(
            len(self.sources[data.train]),
            data.batch_size,
            data.drop_last,
            data.accumulate,
            sampler,
            batch_sampler,
            data.views,
            data.views_at_once,
            _period(stage),
        )

    def mixing(self, stage: Stage) -> Mixing | None:
        """Return what a stage's batches go through."""
        entries = stage.data.batch_transforms
        if not entries:
            return None
        transforms = self.builder.components("batch_transforms", entries)
        return Mixing(transforms, self.seed, _period(stage))

    def loading(self, stage: Stage) -> Loading:
        """Return how a stage's samples are read."""
        data, pinned = stage.data, stage.data.pin_memory
        return Loading(
            data.workers,
            data.prefetch,
            self.device.type == "cuda" if pinned is None else pinned,
            data.worker_timeout,
            data.on_bad_sample,
        )

    def first_batch(self, stage: Stage, source: Source, device: torch.device) -> Batch:
        """Return two samples as the stage's models are trained on them."""
        batch, mixing = self.first_measured(stage, source, device), self.mixing(stage)
        return batch if mixing is None else mixing(batch, 0, 0, device)

    def first_measured(
        self, stage: Stage, source: Source, device: torch.device, size: int = 2, first: int = 0
    ) -> Batch:
        """Return samples, the first two or others, as the stage's models are measured on them."""
        has_views = stage.data.views is not None and source.name == stage.data.train
        skips = stage.data.on_bad_sample
        batch = sample_batch(source, size, self.seed, skips, views=has_views, first=first)
        return batch.to(device, memory_format=memory_format(stage))

    def in_form(self, stage: Stage, models: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Let models lie in memory as the stage wants them."""
        return channels_last(models) if stage.channels_last else nullcontext()

    def save(self, stage: int, epoch: int, more: Mapping[str, Any]) -> None:
        """Write the checkpoint: ``epoch`` epochs of ``stage`` are over."""
        if not distributed.is_main():
            return
        state = {
            "stage": stage,
            "epoch": epoch,
            "models": {name: self.models[name].state_dict() for name in sorted(self.trained)},
            "parts": self.parts.state_dict(),
            "results": [vars(result) for result in self.results],
            **more,
        }
        save_state(self.checkpoint, state)


def _period(stage: Stage) -> int | None:
    """Return after how many epochs the order comes again: mixed views are of a sample's batch."""
    return stage.data.views if stage.data.batch_transforms else None


def memory_format(stage: Stage) -> torch.memory_format | None:
    """Return how a stage's images lie in memory."""
    return torch.channels_last if stage.channels_last else None
