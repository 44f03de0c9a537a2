"""Batch transforms such as MixUp, the same on however many processes share a batch.

What becomes of a sample may depend on the sample before it. A process therefore reads, in front of
its own part of a global batch, as many samples of the part before as there are transforms; they are
left out again once all are mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill import randomness
from distill.data.batch import Batch, map_tensors
from distill.errors import DataError

BatchTransform = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Mixing:
    """Applies batch transforms; what they draw depends on seed, epoch and batch alone.

    Attributes:
        period: epochs after which they draw the same again, ``None`` for never.
    """

    transforms: Sequence[BatchTransform]
    seed: int
    period: int | None = None

    @property
    def lead(self) -> int:
        """How many samples of the neighbouring part a part needs in front."""
        return len(self.transforms)

    def __call__(self, batch: Batch, epoch: int, number: int, device: torch.device) -> Batch:
        """Return the batch ``number`` of an epoch, mixed.

        Raises:
            DataError: if a transform refuses the batch.
        """
        if batch.lead and isinstance(batch.inputs, (list, tuple)):
            raise DataError(
                "under several processes batch transforms need the inputs of a batch as one tensor "
                "(or a mapping of tensors), not as a list"
            )
        inputs, targets = batch.inputs, batch.targets
        epoch = epoch % self.period if self.period else epoch
        base = randomness.derive(self.seed, "mix", epoch)
        for position, transform in enumerate(self.transforms):
            randomness.seed_step(base, number * len(self.transforms) + position, device)
            try:
                inputs, targets = transform(inputs, targets)
            except (ValueError, TypeError, RuntimeError) as error:
                name, text = type(transform).__name__, str(error).splitlines()[0]
                raise DataError(f"batch transform {name} fails on its batch: {text}") from error
        mixed = replace(batch, inputs=inputs, targets=targets)
        return _without_lead(mixed) if batch.lead else mixed


def _without_lead(batch: Batch) -> Batch:
    def own(tensor: torch.Tensor) -> torch.Tensor:
        each = len(tensor) // len(batch.index)  # more than one, of views
        return tensor[batch.lead * each :]

    return replace(
        batch,
        inputs=map_tensors(own, batch.inputs),
        targets=map_tensors(own, batch.targets),
        index=own(batch.index),
        extras=map_tensors(own, batch.extras),
        lead=0,
    )
