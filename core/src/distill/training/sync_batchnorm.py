"""BatchNorm over the global batch, so that results do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill import distributed

_COUNTED: ContextVar[bool] = ContextVar("counted", default=True)


@contextmanager
def synchronized(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let BatchNorm layers in training mode use the statistics of all processes' samples.

    Only ``forward`` is replaced, and given back afterwards: class, parameters and hooks stay, and
    CPUs are served too, which ``torch.nn.SyncBatchNorm`` does not.
    """
    layers = {m for root in modules for m in root.modules() if isinstance(m, _BatchNorm)}
    if distributed.world_size() == 1:
        layers = set()
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave this process's samples out of the statistics: they only keep step with the others."""
    token = _COUNTED.set(False)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def _forward(  # its argument may be given by name, which is torch's
    layer: Any, local: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor
) -> torch.Tensor:
    if not layer.training:
        return local(input)
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    mean, variance, count = _statistics(wide)
    _update_running(layer, mean.detach(), variance.detach(), count)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    scale = torch.rsqrt(variance + layer.eps)
    if layer.affine:
        scale = scale * layer.weight
        shift = layer.bias - mean * scale
    else:
        shift = -mean * scale
    normalized: torch.Tensor = wide * scale.view(shape) + shift.view(shape)
    return normalized.to(input.dtype)


def _statistics(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and biased variance per channel, and the number of values, over processes."""
    dims = [0, *range(2, inputs.dim())]
    weight = 1.0 if _COUNTED.get() else 0.0
    own = inputs.new_full((1,), inputs.numel() / inputs.shape[1])
    sums = _summed(torch.cat([inputs.sum(dims), own]) * weight)
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    shape = (1, -1) + (1,) * (inputs.dim() - 2)
    # Deviations from the common mean, in a second exchange: E[x²] - E[x]² would cancel.
    squares = (inputs - mean.view(shape)).square().sum(dims) * weight
    return mean, _summed(squares) / count, count


class _AllReduce(torch.autograd.Function):
    """The sum over processes; each process's gradient is that of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_ranks(values.clone(), values.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_ranks(gradient.clone(), gradient.device)


def _summed(values: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = _AllReduce.apply(values)
    return total


def _update_running(
    layer: Any, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor
) -> None:
    if layer.running_mean is None:
        return
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:
        momentum = 1.0 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    unbiased = variance * (count / (count - 1).clamp(min=1))
    layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
