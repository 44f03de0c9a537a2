"""What a run tells its observers: console, TensorBoard, result files, or a plugin's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Position:
    """A place in a run: ``stage`` by number; ``epoch`` and ``step`` count what is done."""

    seed: int
    stage: int
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class RunStart:
    """A run begins or goes on.

    Attributes:
        resumed: seed -> where it goes on; what was recorded behind that place is void.
        files: name -> text of the experiment as given and as resolved.
        taken: stages whose outcome is taken from a run before, in place of training them.
        notes: what a person should know before it begins.
    """

    name: str
    directory: Path
    seeds: Sequence[int]
    stages: Sequence[str]
    environment: Mapping[str, Any]
    files: Mapping[str, str]
    resumed: Mapping[int, Position] = field(default_factory=dict)
    taken: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class StageStart:
    """A stage begins; ``teachers`` holds each teacher's measured quality by role."""

    position: Position
    name: str
    epochs: int
    steps: int
    student: str
    parameters: int
    trainable: int
    teachers: Mapping[str, Numbers]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class TermGradients:
    """What each term of a criterion pulls the student with, measured on one batch.

    Attributes:
        at: the values of the student that the gradients are taken with respect to.
        values: each term, unweighted.
        weights: its factor in the total.
        norms: of the gradient of weight times term, for terms that depend on those values.
        shares: each norm over the sum of norms.
        cosines: ``a.b`` -> cosine of the gradients of ``a`` and ``b``, unless one of them is 0.
        warnings: what a person should change, told once a stage and term.
    """

    at: Sequence[str]
    values: Numbers
    weights: Numbers
    norms: Numbers
    shares: Numbers
    cosines: Numbers
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class StepEnd:
    """A log line: mean losses since the last one, and speed.

    Attributes:
        weights: of the terms, where they change over the stage.
        term_gradients: of the step's last batch, where the stage measures them.
    """

    position: Position
    stage: str
    epochs: int
    steps: int
    losses: Numbers
    lr: float
    samples_per_second: float
    seconds_left: float
    weights: Numbers = field(default_factory=dict)
    term_gradients: TermGradients | None = None


@dataclass(frozen=True)
class EvaluationEnd:
    """The student has been measured in the middle of an epoch."""

    position: Position
    stage: str
    metrics: Numbers
    is_best: bool


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is over: its mean losses and what the student reaches on the validation data.

    Attributes:
        metrics: empty in an epoch after which nothing is measured.
        skipped: samples that could not be read, with the reason.
        overflows: steps left out since a gradient overflowed fp16.
        misfits: rows of stored outputs that were damaged, or of another input than the sample is
            now, and have been computed anew.
    """

    position: Position
    stage: str
    epochs: int
    losses: Numbers
    metrics: Numbers
    lr: float
    seconds: float
    samples_per_second: float
    is_best: bool
    skipped: Mapping[int, str] = field(default_factory=dict)
    overflows: int = 0
    misfits: int = 0


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind.

    Attributes:
        validation: metrics of the last epoch.
        best: metrics of the best epoch.
        best_epoch: its number from 1, 0 without validation data.
        test: metrics of the kept student on the test data.
        seconds: of training, without measuring.
        samples_per_second: over them, of all processes together.
        teacher_share: of a step's time, measured on steps with a log line; ``None`` without
            teachers, or if no such step was taken.
        peak_memory: bytes that tensors took on a GPU at most, else that the process took so far;
            of several processes, of the one that took most. 0 if it is not known.
        profile: in a profiled run, part of a step -> its median ``seconds`` and its ``share`` of
            the time; ``step`` is the whole. Of the steps since the run was last started.
    """

    seed: int
    stage: str
    student: str
    parameters: int
    epochs: int
    seconds: float
    validation: Numbers = field(default_factory=dict)
    best: Numbers = field(default_factory=dict)
    best_epoch: int = 0
    test: Numbers = field(default_factory=dict)
    teachers: Mapping[str, Numbers] = field(default_factory=dict)
    samples_per_second: float = 0.0
    teacher_share: float | None = None
    peak_memory: int = 0
    profile: Mapping[str, Numbers] = field(default_factory=dict)


@dataclass(frozen=True)
class StageEnd:
    """A stage is over and its student is written."""

    position: Position
    result: StageResult
    files: Sequence[Path]


@dataclass(frozen=True)
class RunEnd:
    """Every stage of every seed is over.

    Attributes:
        table: the summary in Markdown.
        measured_on: what its numbers are measured on, in words.
    """

    results: Sequence[StageResult]
    table: str
    measured_on: str


@dataclass(frozen=True)
class ControlsEnd:
    """A run is complete, and so is the same run with each control in its teachers' place.

    Attributes:
        table: what each stage reaches with its teachers and with each control, in Markdown.
        measured_on: what its numbers are measured on, in words.
        reading: how to read it.
        directories: of the runs with controls, by control.
    """

    table: str
    measured_on: str
    reading: str
    directories: Mapping[str, Path]


class Observer:
    """Is told of a run as it goes, on the main process only; override what you need."""

    def run_start(self, event: RunStart) -> None:
        """A run begins or goes on."""

    def stage_start(self, event: StageStart) -> None:
        """A stage begins."""

    def step_end(self, event: StepEnd) -> None:
        """A log line is due."""

    def evaluation_end(self, event: EvaluationEnd) -> None:
        """The student has been measured in the middle of an epoch."""

    def epoch_end(self, event: EpochEnd) -> None:
        """An epoch is over."""

    def stage_end(self, event: StageEnd) -> None:
        """A stage is over."""

    def run_end(self, event: RunEnd) -> None:
        """The run is complete."""

    def controls_end(self, event: ControlsEnd) -> None:
        """After the run, it has been run with controls too."""

    def close(self) -> None:
        """The run is over, complete or not; release files."""
