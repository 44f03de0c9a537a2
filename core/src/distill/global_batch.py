"""The rows of all processes: for losses that relate the samples of a batch to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from distill import distributed

_sizes: Sequence[int] = ()


@contextmanager
def shared_out(sizes: Sequence[int]) -> Iterator[None]:
    """Let ``gather`` know how many samples of the global batch each process has."""
    global _sizes
    before, _sizes = _sizes, sizes
    try:
        yield
    finally:
        _sizes = before


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of the global batch, of which this process has its part, in their order.

    To be called on all processes alike. The gradient flows back to every process's rows: a loss
    over the global batch, computed on each process, gives each one the gradient of one process that
    has the whole batch. A row that stands in where a process has no sample left is not among them.
    Outside a training step, and in a single process, the tensor itself.

    Args:
        tensor: (n, ...), or (n * k, ...) with k rows for each of the n samples, whose rows of
            another process may be more or fewer, and whose other sizes are alike.

    Raises:
        ValueError: if the rows are no multiple of the samples.
    """
    if len(_sizes) < 2:
        return tensor
    own = max(_sizes[distributed.rank()], 1)  # with nothing left there is one that stands in
    each, rest = divmod(len(tensor), own)
    if rest or not each:
        raise ValueError(f"{len(tensor)} rows cannot be gathered for {own} samples")
    gathered: torch.Tensor = _Gather.apply(tensor, [size * each for size in _sizes])
    return gathered


class _Gather(torch.autograd.Function):
    """Rows of all processes forward, the sum of all processes' gradients backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.rows, ctx.own = rows, len(tensor)
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: rows[distributed.rank()]] = tensor[: rows[distributed.rank()]]
        everyone = tensor.new_empty(len(rows) * max(rows), *tensor.shape[1:])
        dist.all_gather_into_tensor(everyone, padded)
        parts = everyone.split(max(rows))
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = grads[0].contiguous().clone()
        dist.all_reduce(gradient)
        rank = distributed.rank()
        start, count = sum(ctx.rows[:rank]), ctx.rows[rank]
        own = gradient.new_zeros(ctx.own, *gradient.shape[1:])
        own[:count] = gradient[start : start + count]
        return own, None
