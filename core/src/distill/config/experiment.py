"""What an experiment is: frozen data, read once from a file and never written to again.

Every part carries ``path``, the place in the file where it was written, for messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from distill.config.yaml_document import Document, Path, path_text
from distill.errors import ConfigError, Fault, did_you_mean
from distill.reference import Reference


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


@dataclass(frozen=True)
class Dataset:
    """A data set and the transforms of its inputs, in order."""

    component: Component
    transforms: tuple[Component, ...]


@dataclass(frozen=True)
class Model:
    """A model; ``checkpoint`` is a safetensors file, ``seed`` sets its initial weights apart."""

    component: Component
    checkpoint: str | None
    seed: int


@dataclass(frozen=True)
class Teacher:
    """A model in the teacher's role."""

    model: str
    mode: Literal["eval", "train"]
    min_accuracy: float | None
    path: Path


@dataclass(frozen=True)
class Student:
    """A model in the student's role."""

    model: str
    path: Path


@dataclass(frozen=True)
class Wired:
    """A module whose ``forward`` is fed from references by the names of its parameters."""

    component: Component
    inputs: Mapping[str, Reference]


@dataclass(frozen=True)
class Auxiliary(Wired):
    """A module that is trained with the student."""


@dataclass(frozen=True)
class Term(Wired):
    """A loss with its weight in the total."""

    weight: float


@dataclass(frozen=True)
class Data:
    """What a stage trains and validates on; ``batch_size`` is the global one."""

    train: str
    validate: str | None
    batch_size: int
    workers: int
    drop_last: bool
    path: Path


@dataclass(frozen=True)
class Stage:
    """One stage with everything it inherited filled in.

    Attributes:
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
    freeze: tuple[str, ...]
    criterion: Mapping[str, Term]
    optimizer: Component
    scheduler: Component | None
    precision: Literal["fp32", "bf16", "fp16"]
    metrics: tuple[Component, ...]
    keep: Literal["last", "best"]
    sync_batchnorm: bool
    origins: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Test:
    """What every stage's student is measured on at its end; ``baseline`` names a stage."""

    dataset: str
    metrics: tuple[Component, ...]
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
