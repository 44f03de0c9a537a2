"""A stage's learning-rate schedulers: one, several in a row, or several at once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from distill.config.experiment import Scheduler, Unit
from distill.errors import DistillError
from distill.observer import Numbers


class ScheduleError(DistillError):
    """A scheduler, ``entry``, fails."""

    def __init__(self, entry: Scheduler, message: str):
        self.entry = entry
        super().__init__(message)


class Schedule:
    """Steps schedulers when their unit is over, and hands over from one to the next.

    Each of a row starts from the learning rates of the file, as though training began there;
    torch's SequentialLR lets the next one go on from wherever the last one ended. Without ``until``
    all act at once, each changing what the others left, as in torch's ChainedScheduler.

    Args:
        optimizer: whose learning rates change.
        entries: the file's schedulers.
        build: makes one of them.
        watch: the metric that those which watch one are given unless they name another.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        entries: Sequence[Scheduler],
        build: Callable[[Scheduler, torch.optim.Optimizer], Any],
        watch: str = "",
    ):
        self._optimizer = optimizer
        self._build = build
        self._watch = watch
        in_a_row = any(entry.until is not None for entry in entries)
        self._phases = [[entry] for entry in entries] if in_a_row else [list(entries)]
        self._settings = [_settings(group) for group in optimizer.param_groups]
        self._is_new = False
        self._start(0)

    def advance(self, unit: Unit, done: int, *, followed: bool = True) -> None:
        """Step what counts in ``unit``, of which ``done`` are over in this stage.

        After a step that was not ``followed``, torch would warn of the optimizer's having to come
        first.
        """
        is_new, self._is_new = self._is_new, False
        entry, _ = self._active[0]
        if entry.unit == unit and entry.until is not None and done >= entry.until:
            self._start(self._phase + 1)
            self._is_new = unit == "steps"
            return
        if is_new and unit == "epochs":
            return  # it took over with the epoch's last step, and has not trained yet
        with warnings.catch_warnings() if not followed else nullcontext():
            if not followed:
                warnings.simplefilter("ignore")
            for entry, scheduler in self._active:
                if entry.unit == unit and not watches(scheduler):
                    _step(entry, scheduler)

    def measured(self, metrics: Numbers) -> None:
        """Step what watches a metric."""
        for entry, scheduler in self._active:
            if watches(scheduler):
                scheduler.step(metrics[entry.watch or self._watch])

    def state_dict(self) -> dict[str, Any]:
        """Return which schedulers act and their states."""
        states = [scheduler.state_dict() for _, scheduler in self._active]
        return {"phase": self._phase, "schedulers": states}

    def start_from(self, state: Mapping[str, Any]) -> None:
        """Let those schedulers act that a saved state has; their states follow the optimizer's."""
        self._start(state["phase"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        for (_, scheduler), saved in zip(self._active, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)

    def _start(self, phase: int) -> None:
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **settings})
        self._phase = phase
        entries = self._phases[phase]
        self._active = [(entry, self._build(entry, self._optimizer)) for entry in entries]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _step(entry: Scheduler, scheduler: Any) -> None:
    try:
        scheduler.step()
    except (ValueError, ZeroDivisionError) as error:  # it may have come to its own end
        raise ScheduleError(entry, f"{entry.component.type} cannot go on: {error}") from error


def watches(scheduler: Any) -> bool:
    """Whether a scheduler is stepped with a metric."""
    return "metrics" in inspect.signature(scheduler.step).parameters
