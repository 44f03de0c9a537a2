"""Transforms in the form that is applied to a whole batch, wherever the batch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distill.errors import DataError

IN_CACHE = 2**18
"""So many values at a time go through transforms on a CPU: of large images, what is between two
transforms would else go to memory and back, which costs more than the transforms."""


class BatchedTransform(Protocol):
    """A transform of inputs, each sample of a batch with draws of its own.

    Attributes:
        draws: how many numbers it needs for a sample; 0 if it draws nothing.
        pointwise: whether each value it gives comes from one value alone, in the same bits whether
            it is applied to a sample or to a batch, and on which device.
    """

    draws: int
    pointwise: bool

    def takes(self, value: Any) -> bool:
        """Whether a batch of such inputs can be given to it, as the transform would be given one.

        What the type is (an image, a mask ...) and the number of dimensions may count, not how
        large they are nor of what numbers.
        """

    def __call__(self, inputs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return what becomes of ``inputs`` (B, ...), which stay as they are.

        Args:
            inputs: on any device.
            draws: uniform in [0, 1), float32 (B, ``draws``), on the CPU.
        """


@dataclass(frozen=True)
class Pending:
    """Transforms that the inputs of a batch are still to go through, on the device they go to.

    Attributes:
        data_set: its name, for errors.
        transforms: in order.
        draws: of all of them side by side, float32 (B, sum of theirs); ``None`` if they draw
            nothing.
    """

    data_set: str
    transforms: Sequence[BatchedTransform]
    draws: torch.Tensor | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs, transformed.

        Raises:
            DataError: if a transform fails; the message names data set and transform.
        """
        draws = torch.empty(len(inputs), 0) if self.draws is None else self.draws
        rows = max(1, IN_CACHE // max(1, inputs[:1].numel()))
        if inputs.device.type != "cpu" or len(inputs) <= rows:
            return self._through(inputs, draws)
        parts = zip(inputs.split(rows), draws.split(rows), strict=True)
        result: torch.Tensor | None = None
        for number, (part, drawn) in enumerate(parts):
            made = self._through(part, drawn)
            if result is None:
                result = made.new_empty(len(inputs), *made.shape[1:])
            result[number * rows : (number + 1) * rows] = made
        assert result is not None
        return result

    def _through(self, inputs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        first = 0
        for transform in self.transforms:
            last = first + transform.draws
            draws, first = numbers[:, first:last], last
            try:
                inputs = transform(inputs, draws)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a plugin's
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                kind = type(transform).__name__
                raise DataError(
                    f"data set '{self.data_set}': {kind} fails on a batch: {text}"
                ) from error
        return inputs
