"""Modules that find their shapes in what they are fed: built from the values of two samples."""

from __future__ import annotations

import torch

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
        values = distiller.values_of_models(batch)
        for call in calls:
            if parts.is_unset(call.module):
                key = parts.key(call.module)
                with randomness.seeded(seed, *key, "shapes"):
                    call.set_up(values)
                parts.unset.remove(key)
            if call not in losses:
                with buffers_kept(call.module):
                    values[call.name] = call(values)
