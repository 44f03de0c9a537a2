"""The loss that a model returns itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class ModelLoss(nn.Module):
    """The sum of the losses that a model returns, as detectors and language models do."""

    def __init__(self) -> None:  # nn.Module's takes any parameter
        super().__init__()

    def forward(self, student: Any) -> torch.Tensor:
        """Return a scalar tensor as it is, and of mappings, lists and tuples the sum of all.

        Raises:
            ValueError: if there is anything in it but floating-point scalar tensors, or nothing.
        """
        losses = list(_scalars(student, ""))
        if not losses:
            raise ValueError(f"ModelLoss got an empty {type(student).__name__}: no loss in it")
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total


def _scalars(value: Any, path: str) -> Iterator[torch.Tensor]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _scalars(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _scalars(item, f"{path}.{number}")
    elif isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
        yield value
    else:
        where = f" as '{path.removeprefix('.')}'" if path else ""
        raise ValueError(f"ModelLoss adds up scalar tensors, got {_described(value)}{where}")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"a value of type {type(value).__name__}"
