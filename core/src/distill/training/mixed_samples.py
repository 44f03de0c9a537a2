"""Whether batch transforms mix a sample with none but those before it in its batch.

A row of a store is known by these: one that depends on others would be read for what it is not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from distill.config.experiment import Stage
from distill.data.batch import Batch, map_tensors
from distill.data.mixing import Mixing
from distill.data.source import Source
from distill.training.seed_run import SeedRun

LOOKED_AT = 8
"""So many samples at least are mixed with one another."""
BATCHES = 4
"""So many times, since some transforms do nothing to some batches."""


def check_mixing(run: SeedRun, stage: Stage, role: str, source: Source) -> bool:
    """Refuse a store for samples that are mixed with others than those before them.

    Returns:
        Whether what becomes of a sample depends on its place in the batch of a process, as where
        something is drawn for each.

    Raises:
        ConfigError: saying what they depend on.
    """
    mixing = run.mixing(stage)
    if mixing is None:
        return False
    size = max(LOOKED_AT, 2 * mixing.lead + 2)
    batch = run.first_measured(stage, source, run.device, size=size)
    if not isinstance(batch.inputs, torch.Tensor) or len(batch.inputs) != size:
        return False
    try:
        meets_others = _meets_others(mixing, batch, run.device)
        goes_by_place = _goes_by_place(mixing, batch, run.device)
    except Exception:  # foreign code; what fails is told when the stage is rehearsed
        return False
    if meets_others:
        message = (
            "its batch transforms mix samples with others than those before them, by which stored "
            "rows are not told apart; mix a sample with none but those before it in the batch, one "
            "for each transform, or leave out the store"
        )
        raise run.builder.experiment.error((*stage.teachers[role].path, "store"), message)
    return goes_by_place


def _meets_others(mixing: Mixing, batch: Batch, device: torch.device) -> bool:
    """Whether a sample in place of another changes more than what that one is mixed into."""
    size = len(batch)
    places = torch.arange(size)
    for number in range(BATCHES):
        mixed = _mixed(mixing, batch, places, number, device)
        for changed in range(size):
            chosen = places.clone()
            chosen[changed] = (changed + size // 2) % size
            other = _mixed(mixing, batch, chosen, number, device)
            is_far = (places - changed) % size > mixing.lead
            if not _are_same(mixed[is_far], other[is_far]):
                return True
    return False


def _goes_by_place(mixing: Mixing, batch: Batch, device: torch.device) -> bool:
    """Whether the second of two processes makes something else of its part of a batch."""
    size, lead = len(batch), mixing.lead
    places, half = torch.arange(size), size // 2
    for number in range(BATCHES):
        mixed = _mixed(mixing, batch, places, number, device)
        part = _mixed(mixing, batch, places[half - lead :], number, device, lead)
        if not _are_same(mixed[half:], part):
            return True
    return False


def _mixed(
    mixing: Mixing,
    batch: Batch,
    chosen: torch.Tensor,
    number: int,
    device: torch.device,
    lead: int = 0,
) -> torch.Tensor:
    """Return the inputs of some samples of a batch, mixed; a transform may write into them."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[chosen.to(tensor.device)]

    inputs, targets = map_tensors(own, batch.inputs), map_tensors(own, batch.targets)
    part = replace(batch, inputs=inputs, targets=targets, index=own(batch.index), lead=lead)
    mixed: torch.Tensor = mixing(part, 0, number, device).inputs
    return mixed


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
