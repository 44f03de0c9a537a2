"""Whether batch transforms mix a sample with none but those before it in its batch.

A row of a store is known by these: one that depends on others would be read for what it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from distill.config.experiment import Stage
from distill.data.batch import Batch, map_tensors
from distill.data.mixing import Mixing
from distill.data.source import Source
from distill.errors import DataError
from distill.training.seed_run import SeedRun

LOOKED_AT = 8
"""So many samples are mixed with one another."""
BATCHES = 4
"""So many times, since some transforms do nothing to some batches."""


def check_mixing(run: SeedRun, stage: Stage, role: str, source: Source) -> None:
    """Refuse a store for samples that are mixed with others than those before them.

    Raises:
        ConfigError: saying what they depend on.
    """
    mixing = run.mixing(stage)
    if mixing is None or len(source) < LOOKED_AT:
        return
    batch = run.first_measured(stage, source, run.device, size=LOOKED_AT)
    if not isinstance(batch.inputs, torch.Tensor) or len(batch.inputs) != LOOKED_AT:
        return
    try:
        found = next(_dependences(mixing, batch, run.device), None)
    except DataError:  # told when the stage is rehearsed
        return
    if found is not None:
        message = (
            f"its batch transforms {found}, by which stored rows are not told apart; let each "
            "sample depend on those before it in the batch, one for each transform, or leave out "
            "the store"
        )
        raise run.builder.experiment.error((*stage.teachers[role].path, "store"), message)


def _dependences(mixing: Mixing, batch: Batch, device: torch.device) -> Iterator[str]:
    """Yield what mixed samples depend on beside the samples before them."""
    places = torch.arange(LOOKED_AT)
    for number in range(BATCHES):
        mixed = mixing(batch, 0, number, device).inputs
        if not isinstance(mixed, torch.Tensor) or len(mixed) != LOOKED_AT:
            return
        for changed in range(LOOKED_AT):
            inputs = batch.inputs.clone()
            inputs[changed] = inputs[changed].flip(-1) + 1
            other = mixing(replace(batch, inputs=inputs), 0, number, device).inputs
            is_far = (places - changed) % LOOKED_AT > mixing.lead
            if not torch.equal(mixed[is_far], other[is_far]):
                yield "mix samples with others than those before them"
        half = LOOKED_AT // 2
        part = mixing(_part(batch, half, mixing.lead), 0, number, device).inputs
        if not torch.allclose(mixed[half:], part, rtol=1e-5, atol=1e-6):
            yield "do to a sample what depends on its place in the batch of a process"


def _part(batch: Batch, first: int, lead: int) -> Batch:
    """Return the part of a batch that a second process has, with samples of the first in front."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[first - lead :]

    return replace(
        batch,
        inputs=map_tensors(own, batch.inputs),
        targets=map_tensors(own, batch.targets),
        index=own(batch.index),
        lead=lead,
    )
