"""What a stage measures: its student, the student's average, peers, and its teachers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from distill import distributed
from distill.config.experiment import Metric as MetricEntry
from distill.config.experiment import Stage
from distill.observer import Numbers
from distill.reference import STUDENT
from distill.training.around import special_module
from distill.training.average import Average
from distill.training.evaluation import Evaluating, evaluate
from distill.training.measured_before import measured_key
from distill.training.metrics import is_higher_better
from distill.training.seed_run import SeedRun, memory_format
from distill.training.sharding import is_sharded
from distill.training.stage import REDUCED
from distill.training.teacher_store import TeacherStore


@dataclass
class Best:
    """The best measurement so far; ``epoch`` counts from 1, 0 means none yet."""

    epoch: int = 0
    metrics: Numbers = field(default_factory=dict)

    def beaten_by(self, metrics: Numbers, name: str, higher: bool) -> bool:
        """Whether a metric is better than at the best so far."""
        if name not in metrics or metrics[name] != metrics[name]:
            return False
        if self.epoch == 0:
            return True
        new, old = metrics[name], self.metrics[name]
        return new > old if higher else new < old


@dataclass(frozen=True)
class Measuring:
    """Measures the models of one stage by the same code.

    Attributes:
        roles: student and teachers by role.
        peers: models that train beside the student, measured under ``<name>.<metric>``.
        average: of the student, measured beside it under ``ema.<metric>``.
        takes_part: whether the student runs or trains in the stage; else it is not measured.
        stores: of teachers by role, which know what those out of memory were measured as.
    """

    run: SeedRun
    stage: Stage
    roles: Mapping[str, nn.Module]
    average: Average | None = None
    takes_part: bool = True
    peers: Mapping[str, nn.Module] = field(default_factory=dict)
    stores: Mapping[str, TeacherStore] = field(default_factory=dict)

    def improves(self, best: Best, metrics: Numbers) -> bool:
        """Whether ``metrics`` are the best so far."""
        name = self.stage.decisive
        if name is None or not metrics:
            return False
        entry = self.stage.metric(name)
        assert entry is not None, "the file has been checked for it"
        metric = self.run.builder.component("metrics", entry.component)
        return best.beaten_by(metrics, name, is_higher_better(metric))

    def validate(self) -> dict[str, float]:
        """Measure the student, its average and peers on every validation data set.

        Raises:
            ConfigError: if what decides, or what a scheduler watches, is a part of a metric that it
                turns out not to have.
        """
        if not self.takes_part:
            return {}
        measured = self._validate(STUDENT, self.roles[STUDENT], self._teachers())
        if self.average is not None:
            averaged = self._validate(STUDENT, self.average.model, self._teachers())
            measured.update({f"ema.{name}": value for name, value in averaged.items()})
        for peer, model in self.peers.items():
            of_peer = self._validate(peer, model, self._teachers())
            measured.update({f"{peer}.{name}": value for name, value in of_peer.items()})
        if measured:
            self._check_parts(measured)
        return measured

    def _check_parts(self, measured: Numbers) -> None:
        stage = self.stage
        wanted = [(stage.decisive, stage.places.get("best_by", stage.path))]
        wanted += [(entry.watch, (*entry.component.path, "watch")) for entry in stage.schedulers]
        for name, place in wanted:
            if name is not None and name not in measured:
                text = f"'{name}' is not among what is measured: {', '.join(measured)}"
                raise self.run.builder.experiment.error(place, text)

    def teachers(self) -> dict[str, dict[str, float]]:
        """Measure each teacher before it teaches.

        Raises:
            ConfigError: if one that is no control is below its ``min_accuracy``.
        """
        measured = {}
        for role, teacher in self.stage.teachers.items():
            measured[role] = self._of_teacher(role)
            if teacher.min_accuracy is not None and teacher.control is None:
                self._check_accuracy(role, measured[role])
        return measured

    def _of_teacher(self, role: str) -> dict[str, float]:
        """Measure a teacher; one that is out of memory was measured before."""
        store = self.stores.get(role)
        key = measured_key(self.run, self.stage) if store is not None else ""
        if store is not None and self.stage.teachers[role].instance in self.run.unloaded:
            return dict(store.measured(key) or {})
        measured = self._validate(role, self.roles[role], {})
        if store is not None and measured and distributed.is_main():
            store.note_measured(key, measured)
        return measured

    def test(self, dataset: str, entries: Iterable[MetricEntry]) -> dict[str, float]:
        """Measure the student and its peers as they are now on the test data."""
        model, entries = self.roles[STUDENT], list(entries)
        measured = self._measure(STUDENT, model, dataset, entries, self._teachers())
        for peer, model in self.peers.items():
            of_peer = self._measure(peer, model, dataset, entries, self._teachers())
            measured.update({f"{peer}.{name}": value for name, value in of_peer.items()})
        return measured

    def _teachers(self) -> dict[str, nn.Module]:
        return {role: model for role, model in self.roles.items() if role != STUDENT}

    def _validate(
        self, role: str, model: nn.Module, teachers: Mapping[str, nn.Module]
    ) -> dict[str, float]:
        measured: dict[str, float] = {}
        for number, name in enumerate(self.stage.data.validate):
            prefix = f"{name}." if number else ""
            values = self._measure(role, model, name, self.stage.metrics, teachers)
            measured.update({prefix + key: value for key, value in values.items()})
        return measured

    def _measure(
        self,
        role: str,
        model: nn.Module,
        dataset: str,
        entries: Iterable[MetricEntry],
        teachers: Mapping[str, nn.Module],
    ) -> dict[str, float]:
        metrics = self.run.metrics(entries, teachers)
        how = evaluating(self.run, self.stage)
        # Whatever its role, what is measured stands in the student's place.
        around = {STUDENT: (role, model), **{r: (r, m) for r, m in teachers.items()}}
        specials = {
            place: special_module(self.run.builder, self.stage.roles[r], m)
            for place, (r, m) in around.items()
            if r not in self.peers
        }
        return evaluate(model, self.run.data(dataset), metrics, how, teachers, specials)

    def _check_accuracy(self, role: str, measured: Numbers) -> None:
        teacher, experiment = self.stage.teachers[role], self.run.builder.experiment
        path = (*teacher.path, "min_accuracy")
        accuracy, least = measured.get("accuracy"), teacher.min_accuracy
        if accuracy is None:
            raise experiment.error(path, "needs 'accuracy' among the stage's metrics")
        if least is not None and accuracy < least:
            before = experiment.stages[: experiment.stages.index(self.stage)]
            trained = [stage.name for stage in before if teacher.model in stage.trains]
            why = f"stage {trained[-1]} trained it" if trained else "is its checkpoint right?"
            raise experiment.error(
                path,
                f"teacher '{teacher.model}' reaches an accuracy of only {accuracy:.4f} on "
                f"'{self.stage.data.validate[0]}', less than {least:g}; {why}",
            )


def evaluating(run: SeedRun, stage: Stage) -> Evaluating:
    """Return how a stage runs its models for their metrics."""
    return Evaluating(
        batch_size=stage.data.batch_size,
        device=run.device,
        seed=run.seed,
        loading=run.loading(stage),
        autocast=REDUCED.get(stage.precision),
        memory_format=memory_format(stage),
        in_step=is_sharded(stage),
    )
