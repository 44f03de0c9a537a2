"""A run on the terminal: one line an epoch, and a moving line between where there is a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from time import monotonic
from typing import TextIO

from distill import (
    ControlsEnd,
    EpochEnd,
    EvaluationEnd,
    Observer,
    RunEnd,
    RunStart,
    StageEnd,
    StageStart,
    StepEnd,
)
from distill.builtin.speed import profile_legend, profile_table, speed_line

SECONDS_BETWEEN_PLAIN_LINES = 30
MOST_METRICS_IN_A_LINE = 4


class Console(Observer):
    """Prints what happens."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._moving = self._stream.isatty()
        self._width = 0
        self._last_line = monotonic()
        self._seeds = 1
        self._on_gpu = False
        self._told: set[tuple[int, int, int]] = set()

    def run_start(self, event: RunStart) -> None:
        """Say what runs where."""
        self._seeds = len(event.seeds)
        environment = event.environment
        self._on_gpu = bool(environment.get("gpu"))
        processes = environment.get("processes", 1)
        self._line(
            f"{event.name}: {_count(len(event.stages), 'stage')}, "
            f"{_count(self._seeds, 'seed')}, {environment.get('device')}"
            f"{f', {processes} processes' if processes != 1 else ''} -> {event.directory}"
        )
        for seed, position in event.resumed.items():
            done = position.stage == len(event.stages)
            where = (
                "is complete"
                if done
                else (
                    f"goes on in stage {event.stages[position.stage]} after epoch {position.epoch}"
                )
            )
            self._line(f"seed {seed} {where}")
        if event.taken:
            stages = f"stage{'s' if event.taken[1:] else ''} {', '.join(event.taken)}"
            self._line(f"{stages}: the same as without the control, not trained again")
        for note in event.notes:
            self._line(f"note: {note}")

    def stage_start(self, event: StageStart) -> None:
        """Name the stage, its student and its teachers."""
        seed = f"seed {event.position.seed}, " if self._seeds > 1 else ""
        parameters = _count(event.parameters, "parameter")
        self._line(
            f"\n{seed}stage {event.name}: {event.student} ({parameters}, "
            f"{event.trainable:,} trained), {_count(event.epochs, 'epoch')} "
            f"of {_count(event.steps, 'step')}"
        )
        for role, metrics in event.teachers.items():
            measured = _after(metrics, apart=" ")
            unknown = " not measured: the stage has no validation data, or no metric for it"
            self._line(f"  {role}:{measured or unknown}")
        for note in event.notes:
            self._line(f"  note: {note}")

    def step_end(self, event: StepEnd) -> None:
        """Show losses, speed and remaining time."""
        measured = event.term_gradients
        for warning in measured.warnings if measured is not None else ():
            self._line(f"  warning: {warning}")
        done = event.position.step - event.position.epoch * event.steps
        text = (
            f"  epoch {event.position.epoch + 1}/{event.epochs} step {done}/{event.steps}  "
            f"{_losses(event.losses)}{_shares(measured.shares if measured else {})}  "
            f"{event.samples_per_second:,.0f} samples/s  {_duration(event.seconds_left)} left"
        )
        if self._moving:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot move
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)
        elif monotonic() - self._last_line > SECONDS_BETWEEN_PLAIN_LINES:
            self._line(text)

    def evaluation_end(self, event: EvaluationEnd) -> None:
        """Show what the student reaches in the middle of an epoch."""
        best = "  best" if event.is_best else ""
        self._line(f"  step {event.position.step:,}{_after(event.metrics)}{best}")

    def epoch_end(self, event: EpochEnd) -> None:
        """Show the epoch's means and what the student reaches."""
        measured = _after(event.metrics)
        best = "  best" if event.is_best and event.position.epoch > 1 else ""
        self._line(
            f"  epoch {event.position.epoch}/{event.epochs}  {_losses(event.losses)}"
            f"  lr {event.lr:.3g}  {event.samples_per_second:,.0f} samples/s"
            f"  {event.seconds:.1f} s{measured}{best}"
        )
        if event.overflows:
            left_out = _count(event.overflows, "step")
            self._line(
                f"    {left_out} left out: the gradient overflowed fp16, the scale is lowered"
            )
        if event.skipped:
            self._line(f"    {_count(len(event.skipped), 'sample')} skipped, {self._new(event)}")
        if event.misfits:
            rows = _count(event.misfits, "stored row")
            self._line(f"    {rows} computed anew: damaged, or of samples that have changed")

    def _new(self, event: EpochEnd) -> str:
        """Return what has not been told yet of an epoch's skipped samples."""
        at = event.position.seed, event.position.stage
        new = [index for index in event.skipped if (*at, index) not in self._told]
        self._told.update((*at, index) for index in new)
        if not new:
            return "the same as before"
        some = f"{len(new):,} of them new, " if len(new) < len(event.skipped) else ""
        return f"{some}e.g. {new[0]}: {event.skipped[new[0]]}"

    def stage_end(self, event: StageEnd) -> None:
        """Show the test result, how fast it was, and where the student lies."""
        if event.result.test:
            self._line(f"  test:{_after(event.result.test, apart=' ')}")
        speed = speed_line(event)
        if speed:
            self._line(f"  speed: {speed}")
        if event.result.profile:
            lines = profile_table(event.result.profile).splitlines()
            for line in (*lines, *profile_legend(gpu=self._on_gpu)):
                self._line(f"  {line}")
        self._line(f"  student: {event.files[0]}")

    def run_end(self, event: RunEnd) -> None:
        """Show the table."""
        self._line(f"\n{event.table}\n({event.measured_on})")

    def controls_end(self, event: ControlsEnd) -> None:
        """Show what the method gains beside what the controls gain."""
        self._line(f"\n{event.table}\n({event.measured_on})\n{event.reading}")

    def close(self) -> None:
        """Leave the cursor on a line of its own."""
        if self._width:
            self._line("")

    def _line(self, text: str) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        print(text, file=self._stream, flush=True)
        self._last_line = monotonic()


def _losses(losses: Mapping[str, float]) -> str:
    if len(losses) == 2:  # one term: the total says nothing more
        losses = {name: loss for name, loss in losses.items() if name != "total"}
    return " ".join(f"{name} {loss:.4g}" for name, loss in losses.items())


def _shares(shares: Mapping[str, float]) -> str:
    """Return what part of the gradient each term has."""
    parts = " ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return f"  gradient: {parts}" if parts else ""


def _after(metrics: Mapping[str, float], apart: str = "  ") -> str:
    """Return metrics to put behind something else: a line each data set if there are many."""
    # Parts of a metric (of each class, say) are for the files; there may be hundreds.
    shown = [name for name in metrics if "/" not in name]
    groups: dict[str, list[str]] = {}
    for name in shown:
        value = metrics[name]
        text = f"{value:,.0f}" if name.rpartition(".")[2] == "skipped" else f"{value:.4f}"
        groups.setdefault(name.rpartition(".")[0], []).append(f"{name} {text}")
    if len(shown) > MOST_METRICS_IN_A_LINE:
        apart = "\n    "
    return "".join(apart + " ".join(group) for group in groups.values())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
