"""Each method's experiment, brought to the same pair of models, data, schedule and seeds.

``digits`` takes the plugins' examples on the bundled digits, ``cifar10`` their presets for
CIFAR-100, with CIFAR-10 in its place. Data, models, teacher, student alone and the epochs of the
last stage are those of one file for all; presets keep their optimizers and augmentation, and their
epochs are all scaled alike. Of each method's own file remain the stages behind those, with their
losses, weights, modules and wrappers of data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import distill

ROOT = Path(__file__).resolve().parents[1]
Document = dict[str, Any]

DIGITS = "plugins/distill-kd/examples/digits-kd.yaml"
CIFAR = "cifar100-kd"
TEACHER = "cifar100-teacher"


@dataclass(frozen=True)
class Schedule:
    """What all methods have alike.

    Attributes:
        seeds: as many runs of each.
        epochs: of the student, alone and distilled.
        teacher_epochs: of the teacher.
    """

    seeds: Sequence[int]
    epochs: int
    teacher_epochs: int


def digits(schedule: Schedule, runs: Path) -> Iterator[tuple[str, list[Document]]]:
    """Yield name and experiments, one for each seed, of each method that the digits' models serve.

    Args:
        schedule: what all have alike.
        runs: where ``digits_alone`` has run, whose teachers are taken.
    """
    base = _read(ROOT / DIGITS)
    for file in sorted(ROOT.glob("plugins/*/examples/digits-*.yaml")):
        own = _read(file)
        names = [stage["name"] for stage in own["stages"]]
        is_same_pair = all(own["models"].get(n) == base["models"][n] for n in ("teacher", "alone"))
        if names[:2] == ["teacher", "alone"] and is_same_pair and len(names) > 2:
            brought = _brought(own, base, schedule)
            found = [_behind(brought, seed, runs) for seed in schedule.seeds]
            yield file.stem.removeprefix("digits-"), found
        else:
            print(f"{file.stem}: left out, with another teacher, another student or none alone")


def digits_alone(schedule: Schedule) -> list[Document]:
    """Return what trains the teacher and the student alone, for each seed."""
    base = _read(ROOT / DIGITS)
    found = _brought(base, base, schedule)
    return [
        {
            **found,
            "name": f"alone-{seed}",
            "seeds": [seed],
            "stages": found["stages"][:2],
            "test": {"dataset": "test"},
        }
        for seed in schedule.seeds
    ]


def _behind(brought: Document, seed: int, runs: Path) -> Document:
    """Return what of a method's experiment comes behind teacher and student alone, for one seed."""
    found = copy.deepcopy(brought)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "whole.yaml"
        file.write_text(yaml.safe_dump(brought, sort_keys=False), "utf-8")
        # What the first of these stages leaves out comes from those that are left out.
        found["stages"][:3] = [distill.load(file).resolved["stages"][2]]
    for name in ("teacher", "alone"):
        trained = runs / f"alone-{seed}" / name / "last.safetensors"
        found["models"][name] = {**found["models"][name], "checkpoint": str(trained)}
    return {
        **found,
        "name": f"{found['name']}-{seed}",
        "seeds": [seed],
        "test": {"dataset": "test"},
    }


def _brought(own: Document, base: Document, schedule: Schedule) -> Document:
    """Return a method's experiment with teacher, student alone and epochs of all."""
    found = copy.deepcopy(own)
    found["datasets"] = {**base["datasets"], **own["datasets"]}
    found["observers"] = []
    teacher, alone = copy.deepcopy(base["stages"][:2])
    _set_epochs(teacher, schedule.teacher_epochs)
    _set_epochs(alone, schedule.epochs)
    found["stages"][:2] = [teacher, alone]
    if len(found["stages"]) > 2:
        _set_epochs(found["stages"][-1], schedule.epochs)
    return found


def _set_epochs(stage: Document, epochs: int) -> None:
    """Let a stage train for so long, and its schedule end with it."""
    before = stage.get("epochs")
    stage["epochs"] = epochs
    params = (stage.get("scheduler") or {}).get("params", {})
    if "T_max" in params:
        params["T_max"] = epochs
    if "milestones" in params and before:
        params["milestones"] = [round(m * epochs / before) for m in params["milestones"]]


def cifar10(schedule: Schedule, root: Path, teacher: Path) -> Iterator[tuple[str, list[Document]]]:
    """Yield name and experiments, one for each seed, of each preset with its pair of networks.

    Args:
        schedule: what all have alike.
        root: folder of CIFAR-10.
        teacher: weights of a teacher trained on it by ``cifar10_teacher``.
    """
    presets = _presets()
    base = _on_cifar10(presets[CIFAR], root)
    for name, own in sorted(presets.items()):
        models = {key: model.get("type") for key, model in own["models"].items()}
        if {"cifar_resnet32x4", "cifar_resnet8x4"} - set(models.values()):
            continue
        found = _on_cifar10(own, root)
        found["observers"] = []
        for model in found["models"].values():
            if "checkpoint" in model:
                model["checkpoint"] = str(teacher)
        for stage in found["stages"]:
            if "epochs" in stage:
                share = schedule.epochs / base["stages"][-1]["epochs"]
                _set_epochs(stage, max(1, round(stage["epochs"] * share)))
        yield name.removeprefix("cifar100-"), _for_each_seed(found, name, schedule)


def cifar10_teacher(schedule: Schedule, root: Path) -> Document:
    """Return the experiment that trains the teacher."""
    found = _on_cifar10(_presets()[TEACHER], root)
    found.update(name="teacher", seeds=list(schedule.seeds)[:1], observers=[])
    _set_epochs(found["stages"][0], schedule.teacher_epochs)
    return found


def cifar10_alone(schedule: Schedule, root: Path) -> list[Document]:
    """Return the experiments that train the student alone, one for each seed."""
    found = _on_cifar10(_presets()[CIFAR], root)
    (stage,) = found["stages"]
    del stage["teacher"], found["models"]["teacher"]
    found["observers"] = []
    stage.update(name="alone", criterion={"ce": {"type": "CrossEntropyLoss"}})
    _set_epochs(stage, schedule.epochs)
    return _for_each_seed(found, "alone", schedule)


def _for_each_seed(found: Document, name: str, schedule: Schedule) -> list[Document]:
    return [{**found, "name": f"{name}-{seed}", "seeds": [seed]} for seed in schedule.seeds]


def _on_cifar10(own: Document, root: Path) -> Document:
    found = copy.deepcopy(own)
    for data in found["datasets"].values():
        if data.get("type") == "CIFAR100":
            data["type"] = "CIFAR10"
            data["params"] = {**data["params"], "root": str(root)}
    for model in found["models"].values():
        model["params"] = {**model.get("params", {}), "num_classes": 10}
    for stage in found["stages"]:
        if stage.get("teacher"):  # whose accuracy here is another
            stage["teacher"].pop("min_accuracy", None)
    return found


def _presets() -> dict[str, Document]:
    """Return the installed presets for CIFAR-100 by name."""
    entries = distill.plugins().entries("presets")
    return {e.name: _read(e.factory) for e in entries if e.name.startswith("cifar100-")}


def _read(file: Path) -> Document:
    # As plain data; distill checks it when it is loaded.
    return dict(yaml.safe_load(file.read_text("utf-8")))
