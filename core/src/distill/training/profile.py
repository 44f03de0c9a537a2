"""Where the time of a step goes, and what memory a stage takes."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from distill import distributed
from distill.config.experiment import Data
from distill.model.distiller import Distiller
from distill.training.stage_outputs import StageOutputs

if sys.platform != "win32":
    import resource

DATA = "data"
READ = "data: reading samples (no workers)"
AWAITED = "data: waiting for workers"
FROM_MEMORY = "data: making batches from memory"
TRANSFER = "copy to device, batch transforms"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
OTHER = "rest (schedules, EMA, in between)"
STEP = "step"
FORWARD = {
    "student": "forward of {name}",
    "teacher": "forward of {name}",
    "auxiliary": "auxiliary module {name}",
    "loss": "loss {name}",
}
STORED = "stored outputs of {name}, read or written"
WARM_UP = 3
"""Steps in front of which a profile takes no notice."""
LONGEST = 10_000
"""So many steps a median is over, the last ones."""


def data_part(data: Data) -> str:
    """Return what a step does, or waits for, to have its batch."""
    if data.in_memory:
        return FROM_MEMORY
    return AWAITED if data.workers else READ


class Untimed:
    """The clock of a step that is not timed."""

    def lap(self, part: str, *, always: bool = False) -> None:
        """Say that what the step did since the last time was ``part``, in a profile or always."""

    def skip(self) -> None:
        """Say that what was done since the last time is no part of the step."""

    def stop(self, paused: float = 0.0) -> None:
        """End a step; so many seconds since the last time are no part of it."""


UNTIMED = Untimed()


@dataclass
class StepClock(Untimed):
    """Times the steps of a stage: some of them for the teachers' share, or all, part by part.

    A step that is timed waits for the device: at its ends and around its teachers; in every part if
    it is profiled. Other steps wait for nothing. What is read from a store or written to it is a
    part of its own, and no teacher's.

    Args:
        distiller: whose parts are timed.
        device: of this process.
        log_every: steps between log lines. Steps with a log line are timed, or the last of an epoch
            without one, less the first of all.
        profiles: whether to time every part of every step, less a few in front.
        data: what a profile calls having the batch, see ``data_part``.

    Attributes:
        teachers: seconds of timed steps that teachers took.
        steps: seconds of timed steps.
        timed: how many there were.
    """

    distiller: Distiller
    device: torch.device
    log_every: int
    profiles: bool = False
    data: str = DATA
    teachers: float = 0.0
    steps: float = 0.0
    timed: int = 0
    _seen: int = 0
    _totals: dict[str, float] = field(default_factory=dict)
    _each: dict[str, deque[float]] = field(default_factory=dict)
    _parts: dict[str, float] = field(default_factory=dict)
    _of_teachers: float = 0.0
    _last: float = 0.0
    _within: str = DATA

    def starts(self, done: int, steps: int) -> bool:
        """Start timing if the next step is to be timed, and return whether it is.

        Args:
            done: steps of the epoch so far.
            steps: of an epoch.
        """
        if done >= steps:
            return False
        self._seen += 1
        if self.profiles:
            is_due = self._seen > min(WARM_UP, steps - 1)
        else:
            is_logged = (done + 1) % self.log_every == 0
            is_due = self._seen > 1 and (is_logged or done + 1 == steps < self.log_every)
        if is_due:
            self._wait()
            self._parts, self._of_teachers, self._last = {}, 0.0, perf_counter()
            self._attach(self)
        return is_due

    def __call__(self, kind: str, name: str, call: Callable[[], Any]) -> Any:
        """Time a part of the forward, or of what is read for it."""
        if kind == "store":
            return self._stored(name, call)
        is_teacher = kind == "teacher"
        if not (is_teacher or self.profiles):
            return call()
        self._mark(OTHER)
        self._within, read = FORWARD[kind].format(name=name), self._read(name)
        value = call()
        if is_teacher and self._read(name) > read:
            self._mark(STORED.format(name=name))
        else:
            self._mark(self._within, of_teacher=is_teacher)
        self._within = DATA
        return value

    def _stored(self, name: str, call: Callable[[], Any]) -> Any:
        """Time what is read from a store or written to it, in the middle of another part."""
        is_of_teacher = self._within == FORWARD["teacher"].format(name=name)
        if not (is_of_teacher or self.profiles):
            return call()
        self._mark(self._within, of_teacher=is_of_teacher)
        value = call()
        self._mark(STORED.format(name=name))
        return value

    def _read(self, name: str) -> int:
        """Return how many batches of a teacher have been read from its store."""
        outputs = self.distiller.stores.get(name)
        return outputs.read if isinstance(outputs, StageOutputs) else 0

    def _attach(self, timer: StepClock | None) -> None:
        self.distiller.timer = self.distiller.criterion.timer = timer
        for outputs in self.distiller.stores.values():
            if isinstance(outputs, StageOutputs):
                outputs.timer = timer

    def lap(self, part: str, *, always: bool = False) -> None:
        """Count the time since the last lap."""
        if self.profiles or always:
            self._mark(part)

    def skip(self) -> None:
        """Do not count the time since the last lap."""
        self._wait()
        self._last = perf_counter()

    def stop(self, paused: float = 0.0) -> None:
        """Count the step."""
        self._mark(OTHER)
        self._parts[OTHER] -= min(paused, self._parts[OTHER])
        self._attach(None)
        whole = sum(self._parts.values())
        self.teachers += self._of_teachers
        self.steps += whole
        self.timed += 1
        if self.profiles:
            for part, seconds in {**self._parts, STEP: whole}.items():
                self._totals[part] = self._totals.get(part, 0.0) + seconds
                self._each.setdefault(part, deque(maxlen=LONGEST)).append(seconds)

    def profile(self) -> dict[str, dict[str, float]]:
        """Return each part's median ``seconds`` and its ``share`` of all steps; empty without."""
        whole = self._totals.get(STEP) or 1.0
        return {
            self.data if part == DATA else part: {
                "seconds": median(self._each[part]),
                "share": self._totals[part] / whole,
            }
            for part in self._in_order()
        }

    def _in_order(self) -> list[str]:
        """Return the parts as they come in a step."""
        first, last = [DATA, TRANSFER], [BACKWARD, OPTIMIZER, OTHER, STEP]
        between = [part for part in self._totals if part not in (*first, *last)]
        return [part for part in (*first, *between, *last) if part in self._totals]

    def _mark(self, part: str, *, of_teacher: bool = False) -> None:
        self._wait()
        now = perf_counter()
        took, self._last = now - self._last, now
        self._parts[part] = self._parts.get(part, 0.0) + took
        self._of_teachers += took if of_teacher else 0.0

    def _wait(self) -> None:
        for device in {self.device, *(form.device for form in self.distiller.fast.values())}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()


@dataclass
class Speed:
    """How fast a stage trains, over all that it has trained so far.

    Attributes:
        samples: over all processes.
        seconds: that they took, without those that measured.
        teachers: seconds of timed steps that teachers took.
        steps: seconds of timed steps.
        memory: see ``peak_memory``; the most of all processes.
    """

    samples: int = 0
    seconds: float = 0.0
    teachers: float = 0.0
    steps: float = 0.0
    memory: int = 0

    def after(self, clock: StepClock, device: torch.device) -> Speed:
        """Return it with what a clock and the memory tell of this session."""
        peak = max(distributed.gather_objects(peak_memory(device)))
        return replace(
            self,
            teachers=self.teachers + clock.teachers,
            steps=self.steps + clock.steps,
            memory=max(self.memory, peak),
        )

    @property
    def samples_per_second(self) -> float:
        """Of all processes together."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float | None:
        """What part of a step's time its teachers take; ``None`` if no step was timed."""
        return self.teachers / self.steps if self.steps else None


def forget_peak_memory(device: torch.device) -> None:
    """Let the peak of a device's memory count from now; the process's own cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors took on a GPU, else that the process took so far.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere
