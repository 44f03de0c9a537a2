"""What a stage under way tells the run's observers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distill.config.experiment import Stage
from distill.data.plan import Plan
from distill.observer import (
    EpochEnd,
    EvaluationEnd,
    Numbers,
    Position,
    StageEnd,
    StageResult,
    StageStart,
    StepEnd,
)
from distill.training.loop import EpochSummary, Progress
from distill.training.seed_run import SeedRun


@dataclass(frozen=True)
class StageEvents:
    """Tells observers of one stage."""

    run: SeedRun
    number: int
    stage: Stage
    plan: Plan

    def start(
        self,
        epoch: int,
        parameters: int,
        trainable: int,
        teachers: Mapping[str, Numbers],
        notes: Sequence[str],
    ) -> None:
        """Tell that the stage begins, or goes on after ``epoch`` epochs."""
        event = StageStart(
            position=self._position(epoch),
            name=self.stage.name,
            epochs=self.stage.epochs,
            steps=self.plan.steps,
            student=self.stage.student.model,
            parameters=parameters,
            trainable=trainable,
            teachers=teachers,
            notes=notes,
        )
        self.run.tell("stage_start", event)

    def log(self, epoch: int, progress: Progress, lr: float, weights: Numbers) -> None:
        """Tell how an epoch comes on."""
        left = (self.stage.epochs - epoch) * self.plan.steps - progress.step
        samples = left * self.plan.samples / self.plan.steps
        event = StepEnd(
            position=self._position(epoch, progress.step),
            stage=self.stage.name,
            epochs=self.stage.epochs,
            steps=self.plan.steps,
            losses=progress.losses,
            lr=lr,
            samples_per_second=progress.samples_per_second,
            seconds_left=samples / max(progress.samples_per_second, 1e-9),
            weights=weights,
            term_gradients=progress.term_gradients,
        )
        self.run.tell("step_end", event)

    def evaluation(self, epoch: int, step: int, metrics: Numbers, is_best: bool) -> None:
        """Tell what the student reaches in the middle of an epoch; ``step`` is the stage's."""
        position = self._position(epoch, step - epoch * self.plan.steps)
        event = EvaluationEnd(position, self.stage.name, metrics, is_best)
        self.run.tell("evaluation_end", event)

    def epoch_end(
        self,
        epoch: int,
        summary: EpochSummary,
        metrics: Numbers,
        lr: float,
        skipped: Mapping[int, str],
        misfits: int,
        is_best: bool,
    ) -> None:
        """Tell what an epoch came to."""
        event = EpochEnd(
            position=self._position(epoch + 1),
            stage=self.stage.name,
            epochs=self.stage.epochs,
            losses=summary.losses,
            metrics=metrics,
            lr=lr,
            seconds=summary.seconds,
            samples_per_second=summary.samples / max(summary.seconds, 1e-9),
            is_best=is_best,
            skipped=skipped,
            overflows=summary.overflows,
            misfits=misfits,
        )
        self.run.tell("epoch_end", event)

    def end(self, result: StageResult, files: Sequence[Path]) -> None:
        """Tell that the stage is over."""
        self.run.tell(
            "stage_end", StageEnd(Position(self.run.seed, self.number + 1), result, files)
        )

    def _position(self, epoch: int, step: int = 0) -> Position:
        return Position(self.run.seed, self.number, epoch, epoch * self.plan.steps + step)


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
