"""The training loop: batches through one module, losses into weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from time import monotonic

import torch
from torch import nn

from distill import distributed, randomness
from distill.data.batch import Batch
from distill.data.mixing import Mixing
from distill.errors import NumericalError
from distill.observer import TermGradients
from distill.training.metrics import Meter
from distill.training.non_finite import NonFinite, Seen, Verdicts, losses_are_finite
from distill.training.optimizer import Optimization
from distill.training.profile import (
    BACKWARD,
    DATA,
    OPTIMIZER,
    OTHER,
    TRANSFER,
    UNTIMED,
    StepClock,
    Untimed,
)
from distill.training.sync_batchnorm import uncounted
from distill.training.term_gradients import TermProbe
from distill.training.transfer import copied_ahead

AfterStep = Callable[[int, bool], float | None]


@dataclass(frozen=True)
class Progress:
    """What a log line has to say: mean losses since the last one, and speed.

    Attributes:
        term_gradients: of the step's last batch, where they are measured.
    """

    step: int
    losses: dict[str, float]
    samples_per_second: float
    term_gradients: TermGradients | None = None


@dataclass(frozen=True)
class EpochSummary:
    """What an epoch came to.

    Attributes:
        losses: their means.
        samples: over all processes.
        skipped: samples that this process could not read, with the reason.
        overflows: steps left out since the gradient overflowed fp16.
    """

    losses: dict[str, float]
    samples: int
    seconds: float
    skipped: dict[int, str] = field(default_factory=dict)
    overflows: int = 0


@dataclass(frozen=True)
class Loop:
    """Trains a module that gives named losses for a batch.

    A step is one update of the weights, from one batch or from several accumulated.

    Attributes:
        module: a Distiller, wrapped for distribution or not.
        optimization: what follows the gradients.
        stage: its name, which random numbers depend on.
        log_every: steps between log lines; losses are read from the device only there.
        mixing: batch transforms.
        memory_format: of images.
        hold: context in which gradients are not exchanged yet, since more batches follow.
        probe: measures each term's gradient with every log line, or ``None``.
        clock: times some steps or all, or ``None``.
    """

    module: nn.Module
    optimization: Optimization
    device: torch.device
    seed: int
    stage: str
    log_every: int = 50
    mixing: Mixing | None = None
    memory_format: torch.memory_format | None = None
    hold: Callable[[], AbstractContextManager[None]] = nullcontext
    probe: TermProbe | None = None
    clock: StepClock | None = None
    verdicts: Verdicts = field(default_factory=Verdicts, init=False)

    def epoch(
        self,
        batches: Iterator[Batch],
        *,
        epoch: int = 0,
        first_step: int = 0,
        steps: int = 0,
        on_log: Callable[[Progress], None] = lambda progress: None,
        after_step: AfterStep | None = None,
    ) -> EpochSummary:
        """Train on every batch.

        Args:
            batches: of this process.
            epoch: of the stage, from 0.
            first_step: steps of the stage so far.
            steps: of an epoch, for the clock, which times none without.
            on_log: given the progress every ``log_every`` steps.
            after_step: told after each step how many of the stage are over and whether the gradient
                was followed, which it is not after an overflow in fp16, unless that is known later
                only; may return how many seconds it took that are no training.

        Raises:
            NonFinite: if a gradient is not finite; the weights are then as before the step, unless
                it is noticed late.
            NumericalError: if a mean loss is not finite though its gradients are.
        """
        self.module.train()
        base = randomness.derive(self.seed, "step", self.stage, distributed.rank(), epoch)
        meter, totals, step = Meter(), _Totals(), first_step
        seen: list[Seen] = []
        moves = self.device.type != "cpu" or self.memory_format is not None
        started = last = monotonic()
        clock = self._clock(0, steps)
        if self.device.type == "cuda":
            batches, moves = copied_ahead(batches, self.device, self.memory_format), False
        for number, batch in enumerate(batches):
            clock.lap(DATA)
            if moves or batch.pending is not None:
                batch = batch.to(self.device, non_blocking=True, memory_format=self.memory_format)
            if self.mixing is not None:
                batch = self.mixing(batch, epoch, number, self.device)
            clock.lap(TRANSFER)
            randomness.seed_step(base, number, self.device)
            is_logged = (step + 1 - first_step) % self.log_every == 0 and batch.ends_step
            probe = self.probe if is_logged else None
            losses, term_gradients = self._gradient(batch, probe, clock)
            meter.add(losses, len(batch) if batch.share else 0)
            seen.append(Seen(losses, batch.index, bool(batch.share)))
            if batch.skipped:
                totals.skipped.update(batch.skipped)
            if not batch.ends_step:
                continue
            followed = self._step(seen, step)
            totals.overflows += not followed
            seen.clear()
            step += 1
            clock.lap(OPTIMIZER, always=True)
            if is_logged:
                means, samples = self._read(meter, totals, step)
                now = monotonic()
                speed = samples / max(now - last, 1e-9)
                on_log(Progress(step - first_step, means, speed, term_gradients))
                last = now
            clock.skip()
            paused = 0.0
            if after_step is not None:
                paused = after_step(step, followed) or 0.0
                started, last = started + paused, last + paused
            clock.stop(paused)
            clock = self._clock(step - first_step, steps)
        self._read(meter, totals, step)
        return totals.summary(monotonic() - started)

    def _clock(self, done: int, steps: int) -> Untimed:
        """Return the clock if it times the next step, having started it."""
        is_timed = self.clock is not None and self.clock.starts(done, steps)
        return self.clock if self.clock is not None and is_timed else UNTIMED

    def _gradient(
        self, batch: Batch, probe: TermProbe | None, clock: Untimed
    ) -> tuple[dict[str, torch.Tensor], TermGradients | None]:
        """Add the gradient of one batch; return its losses, and what a probe finds."""
        if batch.share and batch.ends_step:  # as nearly always, without the price of contexts
            return self._forward_and_backward(batch, probe, clock)
        with ExitStack() as contexts:
            if not batch.share:
                contexts.enter_context(uncounted())
            if not batch.ends_step:
                contexts.enter_context(self.hold())
            return self._forward_and_backward(batch, probe, clock)

    def _forward_and_backward(
        self, batch: Batch, probe: TermProbe | None, clock: Untimed
    ) -> tuple[dict[str, torch.Tensor], TermGradients | None]:
        losses: dict[str, torch.Tensor]
        found = None
        if probe is None:
            losses = self.module(batch)
        else:
            with probe.recording():
                losses = self.module(batch)
            clock.lap(OTHER, always=True)
            found = probe.measure(batch.share, self.optimization.scale)
            clock.skip()
        clock.lap(OTHER)
        self.optimization.backward_of(losses, batch.share)
        clock.lap(BACKWARD)
        return losses, found

    def _step(self, seen: list[Seen], step: int) -> bool:
        outcome = self.optimization.step()
        if outcome == "deferred":
            assert self.optimization.verdict is not None
            self.verdicts.add(step + 1, seen, self.optimization.verdict)
            return True
        is_overflow = outcome == "overflow" and losses_are_finite(seen)
        if outcome != "followed" and not is_overflow:
            raise NonFinite(step + 1, list(seen))
        return outcome == "followed"

    def _read(self, meter: Meter, totals: _Totals, step: int) -> tuple[dict[str, float], float]:
        self.verdicts.settle()
        totals.overflows += self.verdicts.overflows
        self.verdicts.overflows = 0
        losses, samples = meter.read()
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise NumericalError(
                    f"stage '{self.stage}': the loss '{name}' became {loss} by step {step}, though "
                    "its gradients are finite; the last checkpoint is from before"
                )
        totals.add(losses, samples)
        return losses, samples


class _Totals:
    """Means over an epoch, from means over its log intervals."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._samples = 0
        self.skipped: dict[int, str] = {}
        self.overflows = 0

    def add(self, losses: dict[str, float], samples: float) -> None:
        self._samples += int(samples)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss * samples

    def summary(self, seconds: float) -> EpochSummary:
        means = {name: value / self._samples for name, value in self._sums.items()}
        return EpochSummary(means, self._samples, seconds, self.skipped, self.overflows)
