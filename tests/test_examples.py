"""The examples check without data, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

import distill

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted([*ROOT.glob("core/examples/*.yaml"), *ROOT.glob("plugins/*/examples/*.yaml")])
DATA = Path(os.environ.get("DISTILL_DATA", ROOT.parent / "shared" / "data"))
PER_CLASS = 12


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_has_no_faults(file: Path) -> None:
    beside = [code for code in [file.with_suffix(".py")] if code.exists()]
    distill.check(distill.load(file), distill.plugins(beside))


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
