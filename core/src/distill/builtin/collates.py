"""Collate functions for samples of different sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from distill import Batch, Sample


class ListCollate:
    """Leaves samples apart, as detection with images of different sizes wants it.

    ``inputs`` and ``targets`` are lists of what the samples hold (``targets`` is ``None`` where
    none has one), ``index`` is int64 (B), every value of ``extras`` is a list.
    """

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch.

        Raises:
            KeyError: if a sample lacks a key of ``extras`` that the first one has.
        """
        targets = [sample.target for sample in samples]
        return Batch(
            inputs=[sample.input for sample in samples],
            targets=None if all(target is None for target in targets) else targets,
            index=_index(samples),
            extras={key: [s.extras[key] for s in samples] for key in samples[0].extras},
        )


class PadCollate:
    """Pads inputs of different sizes at the end of each dimension to the largest of the batch.

    Inputs are tensors of like type and number of dimensions, (S1, ...) -> (B, max S1, ...), or
    mappings of such by key; numbers and texts in them are put together as torch does. Tensors
    without dimensions are stacked.

    ``extras["mask"]`` tells what is padding: bool tensors in the form and shapes of ``inputs``,
    ``True`` where a sample's own value stands. It is there also where nothing had to be padded;
    where ``inputs`` hold no tensor it is left out. ``targets`` and further ``extras`` are put
    together as torch does, so they have like shapes; with ``target_value`` targets are padded too.

    How far a batch is padded depends on the samples in it, so on the number of processes as well: a
    model that does not heed the mask gives other outputs.

    Args:
        value: what inputs are padded with; or by key of the mapping, 0 for keys that it leaves out.
        target_value: what targets are padded with, such as a label that a loss ignores; not at
            all if ``None``.
    """

    def __init__(self, value: float | dict[str, float] = 0.0, target_value: float | None = None):
        self.value, self.target_value = value, target_value

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch.

        Raises:
            ValueError: if tensors differ in type or number of dimensions, cannot hold the padding,
                or a sample has an extra named ``mask``.
            KeyError: if a sample lacks a key that the first one has.
        """
        if "mask" in samples[0].extras:
            raise ValueError("PadCollate gives the extra 'mask', and the samples have one already")
        inputs, mask = self._inputs([sample.input for sample in samples])
        extras = [dict(sample.extras) for sample in samples]
        together = default_collate(extras) if samples[0].extras else {}
        return Batch(
            inputs=inputs,
            targets=self._targets([sample.target for sample in samples]),
            index=_index(samples),
            extras=together if mask is None else {**together, "mask": mask},
        )

    def _inputs(self, inputs: list[Any]) -> tuple[Any, Any]:
        if not isinstance(inputs[0], Mapping):
            if isinstance(self.value, dict):
                raise ValueError("PadCollate has values by key, and the inputs are no mappings")
            return _put_together(inputs, self.value, "inputs")
        padded, masks = {}, {}
        for key in inputs[0]:
            value = self.value.get(key, 0.0) if isinstance(self.value, dict) else self.value
            padded[key], mask = _put_together([item[key] for item in inputs], value, f"'{key}'")
            if mask is not None:
                masks[key] = mask
        return padded, masks or None

    def _targets(self, targets: list[Any]) -> Any:
        if all(target is None for target in targets):
            return None
        if self.target_value is None:
            return default_collate(targets)
        return _put_together(targets, self.target_value, "targets")[0]


def _index(samples: Sequence[Sample]) -> torch.Tensor:
    return torch.tensor([sample.index for sample in samples])


def _put_together(values: list[Any], padding: float, what: str) -> tuple[Any, Any]:
    """Return the values padded, and their mask; without a mask if they are no tensors."""
    if not all(isinstance(value, torch.Tensor) for value in values):
        return default_collate(values), None
    kinds = {(value.dim(), value.dtype) for value in values}
    if len(kinds) > 1:
        found = " and ".join(sorted(f"{dim}-dimensional {dtype}" for dim, dtype in kinds))
        raise ValueError(f"PadCollate cannot put together {what}: {found}")
    return _padded(values, padding, what)


def _padded(tensors: list[torch.Tensor], value: float, what: str) -> tuple[Any, Any]:
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    first = tensors[0]
    if not first.is_floating_point() and not first.is_complex() and value != int(value):
        raise ValueError(f"PadCollate cannot pad {what} of {first.dtype} with {value}")
    padded = first.new_full((len(tensors), *largest), value)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    for number, tensor in enumerate(tensors):
        own = tuple(slice(size) for size in tensor.shape)
        padded[number][own] = tensor
        mask[number][own] = True
    return padded, mask
