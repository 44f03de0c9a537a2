"""What travels from a data set to a model: Sample (one) and Batch (many)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import default_collate

from distill.data.batched import Pending

IMAGES = 4
"""Dimensions of a batch of images, which may lie in memory with the channels last."""


class Views(tuple[Any, ...]):
    """Several images of one sample, as a dataset wrapper makes them of its input.

    Each transform of the file is applied to each of them by itself. The default collate puts the
    views of all samples into one batch, those of a sample side by side: inputs (B * V, ...) beside
    targets and index (B).
    """


@dataclass(frozen=True)
class Sample:
    """One item of a data set.

    Attributes:
        input: what the models are called with.
        target: the label, mask, boxes ...; ``None`` where there is none.
        index: position in the data set; set by the loader.
        extras: further values a dataset wrapper adds, reachable as ``extras.<key>``.
    """

    input: Any
    target: Any = None
    index: int = -1
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Samples put together.

    Attributes:
        inputs: usually a tensor (B, ...).
        targets: labels (B,), masks (B, H, W) ...; ``None`` where there are none.
        index: positions in the data set, int64 (B,).
        extras: further values by key.
        share: weight of this process's part, ``len(batch) * processes / samples of the step``: the
            mean over processes of ``share * loss``, added up over the batches of a step, is the
            mean loss of the step's samples.
        ends_step: whether the weights are updated after this batch.
        lead: so many samples in front belong to another process's part.
        skipped: samples that could not be read, with the reason.
        sizes: how many samples of the global batch each process has; empty outside training.
        view: which of its fixed views each sample is, int64 (B,); ``None`` where views are not
            fixed.
        fingerprint: of what each sample's models are given, int64 (B,), where it is asked for.
        stored: teacher's role -> what a store has of it for these samples.
        pending: transforms that ``to`` applies to the inputs, where they are; ``None`` for none.
    """

    inputs: Any
    targets: Any
    index: torch.Tensor
    extras: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    ends_step: bool = True
    lead: int = 0
    skipped: Sequence[tuple[int, str]] = ()
    sizes: Sequence[int] = ()
    view: torch.Tensor | None = None
    fingerprint: torch.Tensor | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)
    pending: Pending | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(
        self,
        device: torch.device | str,
        *,
        non_blocking: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> Batch:
        """Return the batch with every tensor on ``device``, images in ``memory_format``.

        Its inputs then are what the models are given: nothing is pending any more.

        Raises:
            DataError: if a transform that is pending fails.
        """
        placed = self.map(lambda t: t.to(device, non_blocking=non_blocking))
        if self.pending is not None:
            placed = replace(placed, inputs=self.pending(placed.inputs), pending=None)
        if memory_format is None:
            return placed
        inputs = map_tensors(
            lambda t: t.contiguous(memory_format=memory_format) if t.dim() == IMAGES else t,
            placed.inputs,
        )
        return replace(placed, inputs=inputs)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the DataLoader)."""
        return self.map(lambda t: t.pin_memory())

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with a function applied to each of its tensors."""
        return replace(
            self,
            inputs=map_tensors(function, self.inputs),
            targets=map_tensors(function, self.targets),
            index=function(self.index),
            extras=map_tensors(function, self.extras),
            stored=map_tensors(function, self.stored),
        )


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply ``function`` to every tensor inside dicts, lists and tuples; keep the rest."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def collate(samples: list[Sample]) -> Batch:
    """Put samples together as torch's default collate does; targets stay ``None`` if they are."""
    targets = [sample.target for sample in samples]
    inputs = [view for sample in samples for view in _views(sample.input)]
    return Batch(
        inputs=default_collate(inputs),
        targets=None if all(t is None for t in targets) else default_collate(targets),
        index=torch.tensor([sample.index for sample in samples]),
        extras=default_collate([dict(sample.extras) for sample in samples])
        if samples[0].extras
        else {},
    )


def _views(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Views) else (value,)
