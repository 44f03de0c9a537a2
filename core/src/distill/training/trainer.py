"""One stage from its description to a trained student: build, rehearse, train, measure, save."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.config.experiment import Stage
from distill.data.loader import training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.errors import DataError, NumericalError
from distill.model.wiring import CallError
from distill.observer import Numbers, StageResult
from distill.training import sharding
from distill.training.average import Average
from distill.training.checkpoint import load_weights, peer_file, save_weights
from distill.training.failures import module_error
from distill.training.frozen_teachers import Unchanged
from distill.training.loop import AfterStep, EpochSummary, Loop
from distill.training.measuring import Best, Measuring
from distill.training.non_finite import NonFinite, explanation
from distill.training.prepared import prepare
from distill.training.profile import Speed, StepClock, forget_peak_memory
from distill.training.ready import make_ready
from distill.training.schedule import ScheduleError
from distill.training.seed_run import SeedRun
from distill.training.spread import Spread
from distill.training.stage_events import StageEvents, count_parameters
from distill.training.stored_stage import fingerprints_wanted, with_stored
from distill.training.traceless import keeps_its_own

SINGLE = "more than 1 value per channel"
"""What torch says where BatchNorm is to train on a single sample."""


def train_stage(run: SeedRun, number: int, state: Mapping[str, Any] | None = None) -> StageResult:
    """Train one stage and write its student.

    Args:
        run: what lives through the stages.
        number: of the stage, from 0.
        state: the checkpoint to go on from in the middle of the stage.

    Raises:
        ConfigError, DataError: what the file's wishes cannot be fulfilled with.
        NumericalError: if a gradient becomes infinite or not a number.
    """
    stage = run.builder.experiment.stages[number]
    run.trained.update(stage.trains)
    run.trained.update(t.instance for t in stage.teachers.values() if t.mode == "train")
    forget_peak_memory(run.device)
    with ExitStack() as stack:
        ready = make_ready(run, prepare(run, stage, stack), stack)
        teachers = ready.measuring.teachers() if state is None else state["teachers"]
        training = _Training(run, number, stage, **vars(ready), teachers=teachers)
        if state is not None:
            training.resume(state)
        training.train()
        return training.finish()


@dataclass
class _Training:
    """A stage under way."""

    run: SeedRun
    number: int
    stage: Stage
    spread: Spread
    loop: Loop
    plan: Plan
    source: Source
    measuring: Measuring
    notes: list[str]
    teachers: dict[str, dict[str, float]]
    first_epoch: int = 0
    best: Best = field(default_factory=Best)
    validation: Numbers = field(default_factory=dict)
    seconds: float = 0.0
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        self.events = StageEvents(self.run, self.number, self.stage, self.plan)
        distiller = self.spread.assembly.distiller
        assert distiller is not None
        self.criterion = distiller.criterion

    @property
    def student(self) -> nn.Module:
        return self.spread.assembly.roles["student"]

    @property
    def average(self) -> Average | None:
        return self.spread.average

    @property
    def _clock(self) -> StepClock:
        assert self.loop.clock is not None
        return self.loop.clock

    def _speed(self) -> Speed:
        return self.speed.after(self._clock, self.run.device)

    @property
    def directory(self) -> Path:
        return self.run.directory / self.stage.name

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the epoch a checkpoint was written after."""
        self.first_epoch = state["epoch"]
        self.loop.optimization.load_state_dict(state["optimization"])
        self.best = Best(**state["best"])
        self.validation, self.seconds = state["validation"], state["seconds"]
        self.speed = Speed(**state.get("speed", {}))
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def train(self) -> None:
        """Train the epochs that are left, measuring and saving after each."""
        trainable = sum(p.numel() for p in self.spread.assembly.trainable())
        parameters = count_parameters(self.student)
        self.events.start(self.first_epoch, parameters, trainable, self.teachers, self.notes)
        assembly, distiller = self.spread.assembly, self.spread.assembly.distiller
        assert distiller is not None
        fast = {role: form.model for role, form in distiller.fast.items()}
        present = [role for role in self.stage.teachers if role not in assembly.absent]
        roles = {role: fast.get(role, assembly.roles[role]) for role in present}
        modes = {role: teacher.mode for role, teacher in self.stage.teachers.items()}
        watch = Unchanged(roles, modes)
        self._tell_specials("stage_start")
        for epoch in range(self.first_epoch, self.stage.epochs):
            lr = self.loop.optimization.lr
            self._tell_specials("epoch_start", epoch)
            summary = self._epoch(epoch)
            self._tell_specials("epoch_end", epoch)
            for role in watch.changed():
                raise self.run.builder.experiment.error(
                    self.stage.teachers[role].path,
                    f"the frozen teacher '{role}' has changed while the student trained; a model "
                    "that counts or adapts in its forward cannot teach in this mode",
                )
            self._end_epoch(epoch, summary, lr)
        self._tell_specials("stage_end")

    def _tell_specials(self, event: str, *args: Any) -> None:
        for special in self.spread.assembly.specials.values():
            if hasattr(special, event):
                getattr(special, event)(*args)

    def _epoch(self, epoch: int) -> EpochSummary:
        stage, first_step = self.stage, epoch * self.plan.steps
        self.criterion.set_position(epoch, first_step)
        mixing = self.loop.mixing
        loading = self.run.loading(stage)
        distiller = self.spread.assembly.distiller
        assert distiller is not None
        batches = training_batches(
            self.source,
            self.plan,
            loading,
            seed=self.run.seed,
            epoch=epoch,
            lead=mixing.lead if mixing else 0,
            fingerprints=fingerprints_wanted(stage, distiller.stores),
        )
        batches = with_stored(batches, distiller.stores, epoch, pins=loading.pin_memory)
        try:
            summary = self.loop.epoch(
                batches,
                epoch=epoch,
                first_step=first_step,
                steps=self.plan.steps,
                on_log=lambda progress: self.events.log(
                    epoch, progress, self.loop.optimization.lr, self._scheduled_weights()
                ),
                after_step=self._after_step(epoch),
            )
            distiller.flush_stores()
            return summary
        except NonFinite as error:
            trained = self.spread.assembly.trained()
            raise explanation(error, stage.name, trained, self.source) from error
        except CallError as error:
            if SINGLE in str(error):
                raise self._single_sample() from error
            experiment, assembly = self.run.builder.experiment, self.spread.assembly
            failure = module_error(experiment, assembly, error.module, str(error))
            failure.of_one_process = True
            raise failure from error
        except ScheduleError as error:
            place = error.entry.component.path
            raise self.run.builder.experiment.error(place, str(error)) from error
        except ValueError as error:
            if SINGLE not in str(error):
                raise
            raise self._single_sample() from error

    def _single_sample(self) -> DataError:
        return DataError(
            f"stage '{self.stage.name}': BatchNorm cannot train on a single sample, which the last "
            "batch of an epoch is; set data.drop_last or another data.batch_size"
        )

    def _after_step(self, epoch: int) -> AfterStep | None:
        """Return what is to be done after each step, nothing if that is nothing."""
        schedule, average = self.loop.optimization.schedule, self.average
        scheduled = self.criterion.is_scheduled
        by_steps = self.stage.evaluate.unit == "steps" and self.stage.data.validate
        every = self.stage.evaluate.every if by_steps else 0
        if schedule is None and average is None and not scheduled and not every:
            return None

        def after(step: int, followed: bool) -> float | None:
            if average is not None and followed:
                average.update(self.student)
            if schedule is not None:
                schedule.advance("steps", step, followed=followed)
            if scheduled:
                self.criterion.set_position(epoch, step)
            if not every or step % every or step == self.stage.epochs * self.plan.steps:
                return None
            started = monotonic()
            self.loop.verdicts.settle()
            self._share_state()
            is_best = self._validate(epoch)
            self.events.evaluation(epoch, step, self.validation, is_best)
            self.loop.module.train()
            return monotonic() - started

        return after

    def _share_state(self) -> None:
        """Give all processes the main one's running statistics and the like; look at the weights.

        Raises:
            NumericalError: if weights are not finite though every gradient was.
        """
        modules = [*self.spread.assembly.trained().values()]
        modules += [self.average.model] if self.average is not None else []
        parts = (p for m in modules for p in m.modules() if not keeps_its_own(p))
        distributed.broadcast_from_main([b for p in parts for b in p.buffers(recurse=False)])
        weights = [p.detach() for p in self.loop.optimization.parameters]
        if not sharding.all_finite(weights):
            raise NumericalError(
                f"stage '{self.stage.name}': weights are infinite or no numbers though every "
                "gradient was finite; the last checkpoint is from before. The learning rate is "
                "too high"
            )

    def _end_epoch(self, epoch: int, summary: EpochSummary, lr: float) -> None:
        self.seconds += summary.seconds
        self.speed.samples += summary.samples
        self.speed.seconds += summary.seconds
        self._share_state()
        evaluate = self.stage.evaluate
        is_due = evaluate.unit == "epochs" and (epoch + 1) % evaluate.every == 0
        is_measured = is_due or epoch + 1 == self.stage.epochs
        is_best = is_measured and self._validate(epoch)
        if self.loop.optimization.schedule is not None:
            self.loop.optimization.schedule.advance("epochs", epoch + 1)
        # Told before it is saved: what a kill in between leaves recorded is void on resuming.
        metrics = self.validation if is_measured else {}
        skipped = self._skipped_anywhere(summary)
        misfits = self._misfits_anywhere()
        self.events.epoch_end(epoch, summary, metrics, lr, skipped, misfits, is_best)
        self.spread.sync()
        self.run.save(self.number, epoch + 1, self._state())

    def _validate(self, epoch: int) -> bool:
        """Measure, keep the best weights, step what watches; return whether it is the best."""
        self.validation = self.measuring.validate()
        is_best = self.measuring.improves(self.best, self.validation)
        if is_best:
            self.best = Best(epoch + 1, self.validation)
            is_average = (self.stage.decisive or "").startswith("ema.")
            self._write("best", self.average.model if is_average and self.average else self.student)
        schedule = self.loop.optimization.schedule
        if schedule is not None and self.validation:
            schedule.measured(self.validation)
        return is_best

    def finish(self) -> StageResult:
        """Write what trained, keep the weights that go on, and measure them on the test data."""
        self._write("last", self.student)
        for name, model in self.stage.peers.items():
            self._write(peer_file(model), self.spread.assembly.auxiliary[name])
        if self.average is not None:
            self._write("ema", self.average.model)
        if self.stage.keep != "last" and self.measuring.takes_part:
            self._keep(self.stage.keep)
        test = self.run.builder.experiment.test
        measured = {}
        if test is not None and self.measuring.takes_part:
            measured = self.measuring.test(test.dataset, test.metrics)
        speed = self._speed()
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
            samples_per_second=speed.samples_per_second,
            teacher_share=speed.share if self.stage.teachers else None,
            peak_memory=speed.memory,
            profile=self._clock.profile(),
        )
        self.run.results.append(result)
        # What goes on first: it is what the test measures.
        peers = map(peer_file, self.stage.peers.values())
        names = dict.fromkeys((self.stage.keep, "last", "best", "ema", *peers))
        files = [self.directory / f"{name}.safetensors" for name in names]
        self.events.end(result, [file for file in files if file.exists()])
        self.run.save(self.number + 1, 0, {})
        return result

    def _keep(self, name: str) -> None:
        """Let the student go on with other weights than its last.

        Raises:
            NumericalError: if there are no best ones, since nothing measured was a number.
        """
        if name == "best" and self.best.epoch == 0:
            raise NumericalError(
                f"stage '{self.stage.name}' has no best weights to keep: '{self.stage.decisive}' "
                "was never a number"
            )
        original = self.run.models[self.stage.student.model]
        if distributed.is_main():  # whose disk the others may not see
            load_weights(original, self.directory / f"{name}.safetensors")
        weights = {key: value.cpu() for key, value in original.state_dict().items()}
        original.load_state_dict(distributed.from_main(weights))
        self.spread.load(self.student, original)

    def _write(self, name: str, model: nn.Module) -> None:
        state = sharding.whole(model.state_dict())
        if distributed.is_main():
            save_weights(state, self.directory / f"{name}.safetensors")

    def _scheduled_weights(self) -> Numbers:
        return dict(self.criterion.weights) if self.criterion.is_scheduled else {}

    def _misfits_anywhere(self) -> int:
        distiller = self.spread.assembly.distiller
        assert distiller is not None
        found = sum(outputs.take_refused() for outputs in distiller.stores.values())
        return int(distributed.sum_over_ranks(torch.tensor(found), self.run.device))

    def _skipped_anywhere(self, summary: EpochSummary) -> dict[int, str]:
        if self.stage.data.on_bad_sample == "raise":
            return {}
        ranks = distributed.gather_objects(summary.skipped)
        return {index: why for skipped in ranks for index, why in sorted(skipped.items())}

    def _state(self) -> dict[str, Any]:
        return {
            "optimization": self.loop.optimization.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "best": vars(self.best),
            "validation": dict(self.validation),
            "seconds": self.seconds,
            "speed": vars(self._speed()),
            "teachers": self.teachers,
        }
