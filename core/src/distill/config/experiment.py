"""What an experiment is: frozen data, read once from a file and never written to again.

Every part carries ``path``, the place in the file where it was written, for messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from distill.config.teaching import Fast
from distill.config.yaml_document import Document, Path, path_text
from distill.errors import ConfigError, Fault, did_you_mean
from distill.reference import STUDENT, Reference, Wires
from distill.store_settings import Store
from distill.weight_schedule import WeightSchedule


@dataclass(frozen=True)
class Gaps:
    """Places that hold a fault already told and were left out, so that the rest can be checked."""

    paths: frozenset[Path] = frozenset()

    def explain(self, around: Path, key: str) -> bool:
        """Whether ``key`` is missing there for such a fault: its own, or a misspelling of it."""
        gone = [str(path[-1]) for path in self.paths if path and path[:-1] == around]
        return any(name == key or did_you_mean(name, [key]) for name in gone)


@dataclass(frozen=True)
class Component:
    """Something a plugin builds: its name and parameters."""

    type: str
    params: Mapping[str, Any]
    path: Path


Unit = Literal["epochs", "steps"]
"""What a schedule counts; a step is one update of the weights."""


@dataclass(frozen=True)
class Dataset:
    """A data set, what is put around it, and how its samples become a batch.

    Attributes:
        wrappers: put around the data set, the first one inside.
        joint_transforms: of input and target together, in order, before ``transforms``.
        transforms: of the input, in order.
        collate: samples to batch; ``None`` for torch's default.
    """

    component: Component
    wrappers: tuple[Component, ...]
    joint_transforms: tuple[Component, ...]
    transforms: tuple[Component, ...]
    collate: Component | None


@dataclass(frozen=True)
class Model:
    """A model; ``checkpoint`` is a safetensors file, ``seed`` sets its initial weights apart.

    Attributes:
        redesign: what is made of it for good, after its checkpoint is read.
    """

    component: Component
    checkpoint: str | None
    seed: int
    redesign: Component | None = None


@dataclass(frozen=True)
class Role:
    """A model in a role of a stage.

    Attributes:
        redesign: what the stage runs in its place; ``None`` for as much of it as is needed.
        special: put around it, to call it in another way; ``None`` for a call with the inputs.
    """

    model: str
    path: Path
    redesign: Component | None
    special: Component | None

    @property
    def instance(self) -> str:
        """The name of what a run has in this role: the model's, unless a control replaces it."""
        return self.model


Control = Literal["label_smoothing", "random_teacher", "shuffled_classes"]
"""What stands in a teacher's place, to show what a student would gain without its knowledge."""
CONTROLS: tuple[Control, ...] = get_args(Control)
RANDOM_TEACHER: Control = "random_teacher"


@dataclass(frozen=True)
class Teacher(Role):
    """A model in the teacher's role.

    Attributes:
        control: what stands in its place there.
        store: how its outputs are kept and read again; ``None`` for not at all.
        fast: the faster form that runs in its place; ``None`` for the model as it is.
    """

    mode: Literal["eval", "train"]
    min_accuracy: float | None
    control: Control | None = None
    store: Store | None = None
    fast: Fast | None = None

    @property
    def instance(self) -> str:
        """As for every role; a random teacher stands beside the model of the file."""
        return f"{self.model}@{self.control}" if self.control == RANDOM_TEACHER else self.model


@dataclass(frozen=True)
class Student(Role):
    """A model in the student's role."""


@dataclass(frozen=True)
class Wired:
    """A module whose ``forward`` is fed from references by the names of its parameters."""

    component: Component
    inputs: Mapping[str, Wires]


@dataclass(frozen=True)
class Auxiliary(Wired):
    """A module that is fed from models' features, and trained with the student.

    Attributes:
        module: a model's own module to call again instead of a new one, as ``teacher.fc``.
        origin: stage that made it, and the name it has there.
        frozen: whether it stays as it is, and in eval mode.
        model: a model of the file, which is a peer of the student: trained beside it, and written.
    """

    module: Reference | None
    origin: tuple[str, str]
    frozen: bool
    model: str | None = None


@dataclass(frozen=True)
class Term(Wired):
    """A loss with its weight in the total.

    Attributes:
        adapter: whether student's features are brought to the shape of the teacher's.
    """

    weight: float | WeightSchedule
    adapter: bool = False


@dataclass(frozen=True)
class Freeze:
    """Parameters that stay as they are; with ``statistics``, running statistics of theirs too."""

    match: str
    statistics: bool
    path: Path


@dataclass(frozen=True)
class Data:
    """What a stage trains and validates on.

    Attributes:
        validate: data sets to measure on, the first one decides.
        batch_size: samples a batch, over all processes.
        accumulate: batches a step.
        sampler: which samples in which order; ``None`` for a new permutation every epoch.
        batch_sampler: which samples together, in place of ``sampler`` and ``batch_size``.
        batch_transforms: of a batch's inputs and targets, e.g. MixUp.
        views: so many augmented views there are of each sample, the same whenever they are drawn;
            ``None`` for new ones every epoch.
        views_at_once: so many of them come one after the other, from one reading of the sample.
        in_memory: whether samples are kept as they are before augmentation.
        prefetch: batches each worker prepares ahead.
        pin_memory: ``None`` for wherever a GPU is used.
        worker_timeout: seconds.
    """

    train: str
    validate: tuple[str, ...]
    batch_size: int
    accumulate: int
    drop_last: bool
    sampler: Component | None
    batch_sampler: Component | None
    batch_transforms: tuple[Component, ...]
    views: int | None
    views_at_once: int
    in_memory: bool
    workers: int
    prefetch: int
    pin_memory: bool | None
    worker_timeout: float
    on_bad_sample: Literal["raise", "skip"]
    path: Path


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    Attributes:
        match: modules, classes or name patterns, as in ``freeze``.
        params: settings that differ from the optimizer's.
    """

    match: tuple[str, ...]
    params: Mapping[str, Any]
    path: Path


@dataclass(frozen=True)
class Optimizer:
    """An optimizer; ``no_decay`` says like ``match`` which parameters have no weight decay."""

    component: Component
    groups: tuple[Group, ...]
    no_decay: tuple[str, ...]


@dataclass(frozen=True)
class Scheduler:
    """A scheduler in a row of them.

    Attributes:
        unit: stepped once each.
        until: where in the stage the next one takes over; ``None`` for the stage's end.
        watch: metric it is stepped with if it wants one; ``None`` for the one that decides.
    """

    component: Component
    unit: Unit
    until: int | None
    watch: str | None


@dataclass(frozen=True)
class Clip:
    """Bounds of the gradient: of its norm over all parameters, and of each element."""

    norm: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the student, with a smaller decay at first if ``warmup``."""

    decay: float
    warmup: bool


@dataclass(frozen=True)
class Evaluate:
    """How often a stage measures; its end is always measured."""

    every: int
    unit: Unit


@dataclass(frozen=True)
class Metric:
    """A metric and the name it is reported under."""

    component: Component
    name: str


@dataclass(frozen=True)
class Stage:
    """One stage with everything it inherited filled in.

    Attributes:
        compile: roles whose model is compiled.
        term_gradients: whether each term's gradient is measured with every log line.
        best_by: the metric that decides; ``None`` for the first one.
        origins: key -> stage that wrote it: modules of an inherited ``auxiliary`` or ``criterion``
            are those of that stage, with what they learned.
        places: key -> where it was written.
    """

    name: str
    path: Path
    epochs: int
    data: Data
    teachers: Mapping[str, Teacher]
    student: Student
    auxiliary: Mapping[str, Auxiliary]
    freeze: tuple[Freeze, ...]
    criterion: Mapping[str, Term]
    optimizer: Optimizer
    schedulers: tuple[Scheduler, ...]
    clip: Clip
    precision: Literal["fp32", "bf16", "fp16"]
    channels_last: bool
    compile: tuple[str, ...]
    ema: EMA | None
    parallel: Literal["ddp", "fsdp"]
    sync_batchnorm: bool
    term_gradients: bool
    evaluate: Evaluate
    metrics: tuple[Metric, ...]
    best_by: str | None
    keep: Literal["last", "best", "ema"]
    origins: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Path] = field(default_factory=dict)

    @property
    def roles(self) -> dict[str, Role]:
        """The models of the stage by role, the student first."""
        return {STUDENT: self.student, **self.teachers}

    @property
    def peers(self) -> dict[str, str]:
        """The models that are trained beside the student, by the auxiliary module's name."""
        return {
            name: module.model
            for name, module in self.auxiliary.items()
            if module.model is not None
        }

    @property
    def measured_peers(self) -> dict[str, str]:
        """Those of them that take what the student takes, so that they can be measured likewise."""
        fed = {n: [str(wires) for wires in self.auxiliary[n].inputs.values()] for n in self.peers}
        return {name: model for name, model in self.peers.items() if fed[name] == ["inputs"]}

    @property
    def trains(self) -> list[str]:
        """The models that the stage trains: its student, and those beside it."""
        return [self.student.model, *self.peers.values()]

    @property
    def models(self) -> list[str]:
        """The models that the stage runs, as ``Role.instance``, each one once, student first."""
        named = [role.instance for role in self.roles.values()]
        return list(dict.fromkeys([*named, *self.peers.values()]))

    @property
    def decisive(self) -> str | None:
        """The name of the measurement that tells which weights are best."""
        return self.best_by or next((metric.name for metric in self.metrics), None)

    def metric(self, name: str) -> Metric | None:
        """Return the metric that a measurement is of, whatever prefix and part its name has."""
        plain = name.partition("/")[0]
        fitting = [m for m in self.metrics if plain == m.name or plain.endswith(f".{m.name}")]
        return max(fitting, key=lambda metric: len(metric.name), default=None)


@dataclass(frozen=True)
class Test:
    """What every stage's student is measured on at its end; ``baseline`` names a stage."""

    dataset: str
    metrics: tuple[Metric, ...]
    baseline: str | None
    path: Path


@dataclass(frozen=True)
class Experiment:
    """One file: data, models, stages.

    Attributes:
        resolved: the same as plain data with defaults and inheritance filled in.
        document: the file as given with the place of every value.
        gaps: what is left out of a faulty file; without faults, nothing.
    """

    name: str
    seeds: tuple[int, ...]
    device: str
    log_every: int
    datasets: Mapping[str, Dataset]
    models: Mapping[str, Model]
    stages: tuple[Stage, ...]
    test: Test | None
    observers: tuple[Component, ...]
    resolved: Mapping[str, Any]
    document: Document
    gaps: Gaps = Gaps()

    def fault(self, path: Path, message: str) -> Fault:
        """Return a fault at a place of the file."""
        return Fault(message, path_text(path, self.document.data), self.document.locate(path))

    def error(self, path: Path, message: str) -> ConfigError:
        """Return an error with the one fault."""
        return ConfigError([self.fault(path, message)])
