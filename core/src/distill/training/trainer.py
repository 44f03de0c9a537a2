"""One stage from its description to a trained student: build, rehearse, train, measure, save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from distill import distributed
from distill.config.experiment import Stage
from distill.data.loader import Plan, Source, sample_batch, training_batches
from distill.errors import DataError
from distill.model.wiring import CallError
from distill.observer import (
    EpochEnd,
    Numbers,
    Position,
    StageEnd,
    StageResult,
    StageStart,
    StepEnd,
)
from distill.training.checkpoint import load_weights, save_weights
from distill.training.freezing import Unchanged
from distill.training.loop import EpochSummary, Loop, Progress, distributed_over_ranks
from distill.training.metrics import Metric
from distill.training.optimizer import build_optimization
from distill.training.rehearsal import rehearse
from distill.training.seed_run import SeedRun, measure
from distill.training.stage import (
    Assembly,
    module_error,
    roles_in_force,
)
from distill.training.sync_batchnorm import synchronized


@dataclass
class Best:
    """The best epoch so far by the first metric; ``epoch`` counts from 1, 0 means none yet."""

    epoch: int = 0
    metrics: Numbers = field(default_factory=dict)

    def beaten_by(self, metrics: Numbers) -> bool:
        """Whether the first of ``metrics`` is higher than the best so far."""
        if not metrics:
            return False
        first = next(iter(metrics))
        return self.epoch == 0 or metrics[first] > self.metrics[first]


def train_stage(run: SeedRun, number: int, state: Mapping[str, Any] | None = None) -> StageResult:
    """Train one stage and write its student.

    Args:
        run: what lives through the stages.
        number: of the stage, from 0.
        state: the checkpoint to go on from in the middle of the stage.

    Raises:
        ConfigError, DataError: what the file's wishes cannot be fulfilled with.
        NumericalError: if a loss becomes infinite or not a number.
    """
    stage = run.builder.experiment.stages[number]
    run.trained.add(stage.student.model)
    run.trained.update(t.model for t in stage.teachers.values() if t.mode == "train")
    assembly = run.assemble(stage)
    with ExitStack() as stack:
        stack.enter_context(roles_in_force(assembly))
        teachers = _measure_teachers(run, stage, assembly) if state is None else state["teachers"]
        training = _prepare(run, number, stage, assembly, teachers, stack)
        if state is not None:
            training.resume(state)
        training.train()
        return training.finish()


def _prepare(
    run: SeedRun,
    number: int,
    stage: Stage,
    assembly: Assembly,
    teachers: dict[str, dict[str, float]],
    stack: ExitStack,
) -> _Training:
    source = run.sources[stage.data.train]
    rehearsal = rehearse(run.builder.experiment, assembly, source, run.seed, run.device)
    optimization = build_optimization(run.builder, stage, assembly.trainable(), run.device)
    distiller = assembly.distiller
    assert distiller is not None
    if stage.sync_batchnorm:
        stack.enter_context(synchronized([distiller]))
    batch = sample_batch(source, 2, run.seed).to(run.device)
    module = stack.enter_context(
        distributed_over_ranks(distiller, batch, leaves_unused=rehearsal.unused)
    )
    loop = Loop(
        module, optimization, run.device, run.seed, stage.name, run.builder.experiment.log_every
    )
    plan = Plan(len(source), stage.data.batch_size, stage.data.drop_last)
    training = _Training(run, number, stage, assembly, loop, plan, source, teachers)
    training.notes = _notes(assembly, plan, rehearsal.copied)
    return training


@dataclass
class _Training:
    """A stage under way."""

    run: SeedRun
    number: int
    stage: Stage
    assembly: Assembly
    loop: Loop
    plan: Plan
    source: Source
    teachers: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)
    first_epoch: int = 0
    best: Best = field(default_factory=Best)
    validation: Numbers = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def student(self) -> nn.Module:
        return self.assembly.roles["student"]

    @property
    def directory(self) -> Path:
        return self.run.directory / self.stage.name

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the epoch a checkpoint was written after."""
        self.first_epoch = state["epoch"]
        self.loop.optimization.load_state_dict(state["optimization"])
        self.best = Best(**state["best"])
        self.validation, self.seconds = state["validation"], state["seconds"]

    def train(self) -> None:
        """Train the epochs that are left, measuring and saving after each."""
        self.run.tell("stage_start", self._start_event())
        watch = Unchanged(
            {role: self.assembly.roles[role] for role in self.stage.teachers},
            {role: teacher.mode for role, teacher in self.stage.teachers.items()},
        )
        for epoch in range(self.first_epoch, self.stage.epochs):
            lr = self.loop.optimization.lr
            summary = self._epoch(epoch)
            for role in watch.changed():
                raise self.run.builder.experiment.error(
                    self.stage.teachers[role].path,
                    f"the frozen teacher '{role}' has changed while the student trained; a model "
                    "that counts or adapts in its forward cannot teach in this mode",
                )
            self._end_epoch(epoch, summary, lr)

    def _epoch(self, epoch: int) -> EpochSummary:
        stage = self.stage
        batches = training_batches(
            self.source,
            self.plan,
            seed=self.run.seed,
            epoch=epoch,
            workers=stage.data.workers,
            pin_memory=self.run.device.type == "cuda",
        )
        try:
            return self.loop.epoch(
                batches,
                first_step=epoch * self.plan.steps,
                on_log=lambda progress: self._log(epoch, progress),
            )
        except CallError as error:
            experiment = self.run.builder.experiment
            raise module_error(experiment, self.assembly, error.module, str(error)) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"stage '{stage.name}': BatchNorm cannot train on a single sample, which the last "
                "batch of an epoch is; set data.drop_last or another data.batch_size"
            ) from error

    def _end_epoch(self, epoch: int, summary: EpochSummary, lr: float) -> None:
        distributed.broadcast_from_main(list(self.student.buffers()))
        self.seconds += summary.seconds
        self.validation = self._measure(self.student, self.stage.data.validate)
        is_best = self.best.beaten_by(self.validation)
        if is_best:
            self.best = Best(epoch + 1, self.validation)
            self._write("best")
        watched = next(iter(self.validation.values()), None)
        self.loop.optimization.end_epoch(watched)
        # Told before it is saved: what a kill in between leaves recorded is void on resuming.
        self.run.tell(
            "epoch_end",
            EpochEnd(
                position=Position(self.run.seed, self.number, epoch + 1, self._steps(epoch + 1)),
                stage=self.stage.name,
                epochs=self.stage.epochs,
                losses=summary.losses,
                metrics=self.validation,
                lr=lr,
                seconds=summary.seconds,
                samples_per_second=summary.samples / max(summary.seconds, 1e-9),
                is_best=is_best,
            ),
        )
        self.run.save(self.number, epoch + 1, self._state())

    def finish(self) -> StageResult:
        """Write the student, keep the weights that go on, and measure them on the test data."""
        self._write("last")
        if self.stage.keep == "best":
            distributed.barrier()
            load_weights(self.student, self.directory / "best.safetensors")
        test = self.run.builder.experiment.test
        measured: dict[str, float] = {}
        if test is not None:
            metrics = self.run.metrics(test.metrics)
            measured = self._measure(self.student, test.dataset, metrics)
        result = StageResult(
            seed=self.run.seed,
            stage=self.stage.name,
            student=self.stage.student.model,
            parameters=count_parameters(self.student),
            epochs=self.stage.epochs,
            seconds=self.seconds,
            validation=self.validation,
            best=self.best.metrics,
            best_epoch=self.best.epoch,
            test=measured,
            teachers=self.teachers,
        )
        self.run.results.append(result)
        files = [self.directory / f"{name}.safetensors" for name in ("last", "best")]
        self.run.tell(
            "stage_end",
            StageEnd(
                Position(self.run.seed, self.number + 1),
                result,
                [file for file in files if file.exists()],
            ),
        )
        self.run.save(self.number + 1, 0, {})
        return result

    def _measure(
        self, model: nn.Module, dataset: str | None, metrics: dict[str, Metric] | None = None
    ) -> dict[str, float]:
        return measure(self.run, self.stage, model, dataset, metrics)

    def _write(self, name: str) -> None:
        if distributed.is_main():
            save_weights(self.student, self.directory / f"{name}.safetensors")

    def _steps(self, epoch: int) -> int:
        return epoch * self.plan.steps

    def _state(self) -> dict[str, Any]:
        return {
            "optimization": self.loop.optimization.state_dict(),
            "best": vars(self.best),
            "validation": dict(self.validation),
            "seconds": self.seconds,
            "teachers": self.teachers,
        }

    def _start_event(self) -> StageStart:
        epoch = self.first_epoch
        return StageStart(
            position=Position(self.run.seed, self.number, epoch, self._steps(epoch)),
            name=self.stage.name,
            epochs=self.stage.epochs,
            steps=self.plan.steps,
            student=self.stage.student.model,
            parameters=count_parameters(self.student),
            trainable=sum(p.numel() for p in self.assembly.trainable()),
            teachers=self.teachers,
            notes=self.notes,
        )

    def _log(self, epoch: int, progress: Progress) -> None:
        left = (self.stage.epochs - epoch) * self.plan.steps - progress.step
        self.run.tell(
            "step_end",
            StepEnd(
                position=Position(
                    self.run.seed, self.number, epoch, self._steps(epoch) + progress.step
                ),
                stage=self.stage.name,
                epochs=self.stage.epochs,
                steps=self.plan.steps,
                losses=progress.losses,
                lr=self.loop.optimization.lr,
                samples_per_second=progress.samples_per_second,
                seconds_left=left * self.plan.batch_size / max(progress.samples_per_second, 1e-9),
            ),
        )


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _measure_teachers(
    run: SeedRun, stage: Stage, assembly: Assembly
) -> dict[str, dict[str, float]]:
    """Measure each teacher before it teaches; one below its ``min_accuracy`` is an error."""
    measured = {}
    for role, teacher in stage.teachers.items():
        measured[role] = measure(run, stage, assembly.roles[role], stage.data.validate)
        if teacher.min_accuracy is None:
            continue
        accuracy = measured[role].get("accuracy")
        path = (*teacher.path, "min_accuracy")
        if accuracy is None:
            raise run.builder.experiment.error(path, "needs 'accuracy' among the stage's metrics")
        if accuracy < teacher.min_accuracy:
            raise run.builder.experiment.error(
                path,
                f"teacher '{teacher.model}' reaches an accuracy of only {accuracy:.4f} on "
                f"'{stage.data.validate}'; is its checkpoint right?",
            )
    return measured


def _notes(assembly: Assembly, plan: Plan, copied: Iterable[str]) -> list[str]:
    notes = [f"{name} is overwritten by the model, so it is copied" for name in copied]
    if assembly.frozen:
        notes.append(f"{sum(p.numel() for p in assembly.frozen):,} parameters are frozen")
    if plan.size % plan.batch_size == 1 and not plan.drop_last:
        notes.append("the last batch of an epoch is a single sample; data.drop_last leaves it out")
    return notes
