"""The examples check without data, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

import distill
from distill.inspection import models_of_file
from distill.model.capture import split_path
from distill.reference import each_reference
from distill.training.build import Builder

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted([*ROOT.glob("core/examples/*.yaml"), *ROOT.glob("plugins/*/examples/*.yaml")])
DATA = Path(os.environ.get("DISTILL_DATA", ROOT.parent / "shared" / "data"))
FEATURES = sorted(ROOT.glob("plugins/distill-fitnet/examples/*.yaml"))
PER_CLASS = 12


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_has_no_faults(file: Path) -> None:
    beside = [code for code in [file.with_suffix(".py")] if code.exists()]
    distill.check(distill.load(file), distill.plugins(beside))


@pytest.mark.parametrize("file", FEATURES, ids=lambda file: file.stem)
def test_inspect_lists_every_layer_that_an_example_asks_for(file: Path) -> None:
    experiment, registry = distill.load(file), distill.plugins()
    inspected = models_of_file(experiment, registry, None, None)
    listed = {one.name: [row.path for row in one.rows] for one in inspected}
    bare = {name: replace(m, checkpoint=None) for name, m in experiment.models.items()}
    builder = Builder(replace(experiment, models=bare), registry)
    asked = 0
    for stage in experiment.stages:
        for part in (*stage.auxiliary.values(), *stage.criterion.values()):
            for _, ref in each_reference(part.inputs):
                if ref.owner in stage.roles and ref.path:
                    name = stage.roles[ref.owner].model
                    path = split_path(builder.model(name, 0), ref.path)[0]
                    assert path in [row.partition("@")[0] for row in listed[name]], ref.text
                    asked += 1
    assert asked or "teacher" in file.stem


def test_core_s_example_runs_with_core_and_a_local_file(tmp_path: Path) -> None:
    file = ROOT / "core/examples/moons.yaml"
    _distill(tmp_path, "run", str(file), "-p", str(file.with_suffix(".py")))
    results = json.loads((tmp_path / "runs/moons/results.json").read_text())
    assert results[-1]["validation"]["accuracy"] > 0.8


def test_the_digits_are_learned_with_augmentation(tmp_path: Path) -> None:
    _distill(tmp_path, "run", str(ROOT / "plugins/datasets-vision/examples/digits.yaml"))
    results = json.loads((tmp_path / "runs/digits/results.json").read_text())
    assert results[-1]["test"]["accuracy"] > 0.9


def test_the_demo_s_student_gains_from_its_teacher(tmp_path: Path) -> None:
    file = ROOT / "plugins/distill-kd/examples/digits-kd.yaml"
    printed = _distill(tmp_path, "run", str(file), "-s", "seeds=[1, 3]")
    assert "gain over alone" in printed
    results = json.loads((tmp_path / "runs/digits-kd/results.json").read_text())
    accuracy = {(r["stage"], r["seed"]): r["test"]["accuracy"] for r in results}
    gains = [accuracy["distilled", seed] - accuracy["alone", seed] for seed in (1, 3)]
    assert mean(gains) > 0.01


def test_cifar10_runs_from_folders_of_images(tmp_path: Path) -> None:
    archives = [DATA / f"cifar10-{part}.zip" for part in ("train", "test")]
    if not all(archive.exists() for archive in archives):
        pytest.skip(f"needs {archives[0].name} and {archives[1].name} in {DATA} (DISTILL_DATA)")
    for archive in archives:
        with zipfile.ZipFile(archive) as images:
            images.extractall(tmp_path / "data/cifar10", _first_of_each_class(images))
    file = ROOT / "plugins/distill-kd/examples/cifar10-kd.yaml"
    short = ["-s", "stages.teacher.epochs=1", "-s", "stages.teacher.data.batch_size=40"]
    printed = _distill(tmp_path, "run", str(file), *short)
    assert "gain over alone" in printed
    for stage in ("teacher", "alone", "kd"):
        assert (tmp_path / "runs/cifar10-resnet34-kd" / stage / "last.safetensors").exists()


def _first_of_each_class(images: zipfile.ZipFile) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in sorted(images.namelist()):
        folder = name.rpartition("/")[0]
        seen[folder] = seen.get(folder, 0) + 1
        if seen[folder] <= PER_CLASS and name.endswith(".jpg"):
            yield name


def _distill(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "distill", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
