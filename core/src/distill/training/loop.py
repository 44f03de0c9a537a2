"""The training loop: batches through one module, losses into weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill import distributed, randomness
from distill.data.batch import Batch
from distill.errors import NumericalError
from distill.model.criterion import TOTAL
from distill.training.metrics import Meter
from distill.training.optimizer import Optimization
from distill.training.sync_batchnorm import uncounted


@dataclass(frozen=True)
class Progress:
    """What a log line has to say: mean losses since the last one, and speed."""

    step: int
    losses: dict[str, float]
    samples_per_second: float


@dataclass(frozen=True)
class EpochSummary:
    """Mean losses of an epoch; ``samples`` over all processes."""

    losses: dict[str, float]
    samples: int
    seconds: float


@dataclass(frozen=True)
class Loop:
    """Trains a module that gives named losses for a batch.

    Attributes:
        module: a Distiller, wrapped for distribution or not.
        optimization: what follows the gradients.
        stage: its name, which random numbers depend on.
        log_every: steps between log lines; losses are read from the device only there.
    """

    module: nn.Module
    optimization: Optimization
    device: torch.device
    seed: int
    stage: str
    log_every: int = 50

    def epoch(
        self,
        batches: Iterator[Batch],
        *,
        first_step: int = 0,
        on_log: Callable[[Progress], None] = lambda progress: None,
    ) -> EpochSummary:
        """Train on every batch; ``first_step`` counts the steps of the stage so far.

        Raises:
            NumericalError: if a mean loss is not finite.
        """
        self.module.train()
        base = randomness.derive(self.seed, "step", self.stage, distributed.rank())
        meter, totals, step = Meter(), _Totals(), first_step
        started = last = monotonic()
        for number, batch in enumerate(batches, start=1):
            if self.device.type != "cpu":  # where it is already
                batch = batch.to(self.device, non_blocking=True)
            randomness.seed_step(base, step, self.device)
            self._step(batch, meter)
            step += 1
            if number % self.log_every == 0:
                losses, samples = self._read(meter, totals, step)
                now = monotonic()
                on_log(Progress(number, losses, samples / max(now - last, 1e-9)))
                last = now
        self._read(meter, totals, step)
        return EpochSummary(totals.means(), totals.samples, monotonic() - started)

    def _step(self, batch: Batch, meter: Meter) -> None:
        losses = self._losses(batch)
        total = losses[TOTAL]
        self.optimization.step(total if batch.share == 1.0 else total * batch.share)
        meter.add(losses, len(batch) if batch.share else 0)

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.share:
            return self.module(batch)  # type: ignore[no-any-return]
        with uncounted():
            return self.module(batch)  # type: ignore[no-any-return]

    def _read(self, meter: Meter, totals: _Totals, step: int) -> tuple[dict[str, float], float]:
        losses, samples = meter.read()
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise NumericalError(
                    f"stage '{self.stage}': the loss '{name}' became {loss} by step {step}; the "
                    "last checkpoint is from before. A lower learning rate or gradient is needed"
                )
        totals.add(losses, samples)
        return losses, samples


class _Totals:
    """Means over an epoch, from means over its log intervals."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self.samples = 0

    def add(self, losses: dict[str, float], samples: float) -> None:
        self.samples += int(samples)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss * samples

    def means(self) -> dict[str, float]:
        return {name: value / self.samples for name, value in self._sums.items()}


@contextmanager
def distributed_over_ranks(
    module: nn.Module, batch: Batch, *, leaves_unused: bool
) -> Iterator[nn.Module]:
    """Wrap a module so that gradients are averaged over processes; alone, it stays as it is.

    ``batch`` is run through twice first, and its traces removed: torch puts gradients into other
    buckets after the first backward of each process, which would change the order of additions
    between a run and its continuation.
    """
    if distributed.world_size() == 1:
        yield module
        return
    with warnings.catch_warnings():
        # The new name of the argument is not known to the oldest torch that distill runs with.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped: nn.Module = DistributedDataParallel(
            module,
            broadcast_buffers=False,
            find_unused_parameters=leaves_unused,
            gradient_as_bucket_view=True,
        )
    wrapped.train()
    with buffers_kept(module):
        for _ in range(2):
            wrapped(batch)[TOTAL].backward()
    module.zero_grad(set_to_none=True)
    yield wrapped


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give buffers back what they held: running statistics, memory banks, counters."""
    before = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffers, held in before:  # those that a forward made anew or replaced
            buffers.clear()
            buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
