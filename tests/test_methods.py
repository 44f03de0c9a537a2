"""Every method trains, goes on where it stopped, and over two processes.

Each of its examples is run for one or two epochs a stage on a few digits.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

import distill
from distill import distributed
from distill.registry import SINGULAR, Entry, Registry
from distill.testing import run_processes

PLUGINS = Path(__file__).parents[1] / "plugins"
TEACHER = PLUGINS / "distill-fitnet/examples/digits-teacher.yaml"
"""What those without a teacher of their own take theirs from."""
EXAMPLES = sorted(
    file
    for plugin in ("distill-crd", "distill-fitnet", "distill-kd", "distill-relational")
    for file in (PLUGINS / plugin / "examples").glob("digits-*.yaml")
    if file != TEACHER
)

PER_PROCESS = {
    "digits-cckd": "relates the samples that a process has",
    "digits-dist": "correlates over the samples that a process has",
    "digits-dist-plus": "correlates over the samples that a process has",
    "digits-ghnd": "sums over the samples that a process has, and processes are averaged",
    "digits-hnd": "sums over the samples that a process has, and processes are averaged",
    "digits-mgd": "each process draws masks of its own",
    "digits-mlkd": "relates the samples that a process has",
    "digits-pkt": "relates the samples that a process has",
    "digits-rkd": "relates the samples that a process has",
    "digits-skd": "relates the samples that a process has",
    "digits-spkd": "relates the samples that a process has",
    "digits-srd": "normalises by the samples that a process has",
    "digits-sskd": "compares a copy with the originals that a process has",
    "digits-vitkd": "each process draws masks of its own",
}
"""Methods that two processes train otherwise than one does, and why."""
ROUNDING = 1e-6


class Stop(distill.Observer):
    """Ends a run when an epoch of a stage is over, before it is saved; once."""

    place: tuple[str, int] | None = None

    def epoch_end(self, event: distill.EpochEnd) -> None:
        if Stop.place == (event.stage, event.position.epoch):
            Stop.place = None
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Uninterrupted:
    """A folder in which each example is run once, by whichever worker of the tests asks first."""

    folder: Path

    def __call__(self, example: Path) -> Path:
        """Return the folder when an example has run in it."""
        with FileLock(self.folder / "lock"):
            run(TEACHER, self.folder, self.folder)  # which does nothing where it has run
        with FileLock(self.folder / f"{example.stem}.lock"):
            run(example, self.folder, self.folder)
        return self.folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "uninterrupted"
    folder.mkdir(exist_ok=True)
    return Uninterrupted(folder)


def test_two_processes_train_what_one_does(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """All in one test: each worker of the tests would start the processes for its own share."""
    run_processes(__file__, str(tmp_path))
    differences = {}
    for example in EXAMPLES:
        ours, theirs = weights(uninterrupted(example), example), weights(tmp_path, example)
        assert ours.keys() == theirs.keys()
        differences[example.stem] = max((ours[n] - theirs[n]).abs().max().item() for n in ours)
    others = {name for name, difference in differences.items() if difference >= ROUNDING}
    assert others == set(PER_PROCESS), differences


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_a_method_trains_with_finite_losses(example: Path, uninterrupted: Uninterrupted) -> None:
    ended = [
        event for event in events(uninterrupted(example), example) if event["event"] == "epoch"
    ]
    assert [epoch["stage"] for epoch in ended] == [
        s for s in stages(example) for _ in range(epochs(s))
    ]
    assert all(math.isfinite(value) for epoch in ended for value in epoch["losses"].values())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_a_stopped_method_goes_on_to_the_same_bits(
    example: Path, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    trained = uninterrupted(example)
    for stage in stages(example):
        if epochs(stage) == 2:
            Stop.place = (stage, 2)
            with pytest.raises(KeyboardInterrupt):
                run(example, tmp_path, trained)
    run(example, tmp_path, trained)
    ours, theirs = weights(trained, example), weights(tmp_path, example)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def run_all(folder: Path) -> None:
    for example in [TEACHER, *EXAMPLES]:
        run(example, folder, folder)


def run(example: Path, folder: Path, trained: Path) -> None:
    experiment = distill.load(example, shortened(example, trained))
    distill.run(experiment, registry=registry(), runs=folder)


def shortened(example: Path, trained: Path) -> Iterator[str]:
    """Yield overrides with which an example takes a few steps a stage.

    Args:
        example: its file.
        trained: where ``TEACHER`` has run.
    """
    given = yaml.safe_load(example.read_text("utf-8"))
    yield "seeds=[0]" if "seeds" in given else "seed=0"
    yield "device=cpu"
    yield "observers=[ResultFiles, Stop]"
    for name in given["datasets"]:
        yield f"datasets.{name}.params.labels_per_class=2"
    for name, model in given["models"].items():
        if "checkpoint" in model:
            yield f"models.{name}.checkpoint={trained / TEACHER.stem}/teacher/last.safetensors"
    for stage in given["stages"]:
        place = f"stages.{stage['name']}"
        yield f"{place}.epochs={epochs(stage['name'])}"
        # Not Adam, which blows the rounding of a bias before BatchNorm up to full steps.
        yield f"{place}.optimizer={{type: SGD, params: {{lr: 1.0e-3, momentum: 0.9}}}}"
        if "data" in stage:
            yield f"{place}.data.batch_size=10"
            if "batch_sampler" in stage["data"]:
                yield f"{place}.data.batch_sampler.params.samples_per_class=2"
        if "min_accuracy" in (stage.get("teacher") or {}):
            yield f"{place}.teacher.min_accuracy=0.0"
        for role, teacher in (stage.get("teachers") or {}).items():
            if "min_accuracy" in teacher:
                yield f"{place}.teachers.{role}.min_accuracy=0.0"


def registry() -> Registry:
    """Return what is installed, and ``Stop``."""
    installed = distill.plugins()
    entries = [entry for kind in SINGULAR for entry in installed.entries(kind)]
    return Registry([*entries, Entry("observers", "Stop", Stop, "this test")], installed.records)


def epochs(stage: str) -> int:
    """Return how many a stage is given: two where it can stop in the middle, of the method."""
    return 1 if stage in ("alone", "teacher") else 2


def stages(example: Path) -> list[str]:
    return [stage["name"] for stage in yaml.safe_load(example.read_text("utf-8"))["stages"]]


def weights(folder: Path, example: Path) -> Mapping[str, torch.Tensor]:
    """Return the weights that each stage of an example has left behind."""
    directory = folder / example.stem
    files = sorted(directory.rglob("*.safetensors"))
    return {f"{f.relative_to(directory)} {k}": v for f in files for k, v in load_file(f).items()}


def events(folder: Path, example: Path) -> list[dict[str, Any]]:
    lines = (folder / example.stem / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    run_all(Path(sys.argv[1]))
