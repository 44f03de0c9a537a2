"""Both stages of SSKD train, go on where they stopped, and over two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distill
import distill_crd
from distill.testing import run_processes, toy_experiment, toy_registry

ROUNDING = 1e-6
SIDE = 4
EMBEDDINGS = {"student_embeddings": "student_head", "teacher_embeddings": "teacher_head"}
SGD = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}


class Stop(distill.Observer):
    """Ends a run when the second epoch of a stage is over, before it is saved; once."""

    stage: str | None = None

    def epoch_end(self, event):
        if (Stop.stage, 2) == (event.stage, event.position.epoch):
            Stop.stage = None
            raise KeyboardInterrupt


def run(folder, gather="none", criterion=None, more=None):
    """Run both stages on noisy images; the second with a criterion and auxiliary modules more."""
    loss = {"type": "SSKDLoss", "params": {"tf_ratio": 0.5, "gather": gather}, "inputs": EMBEDDINGS}
    head = {"type": "SSKDHead", "inputs": {"features": "teacher.relu"}}
    rotations = {"type": "SelfSupervisionLoss", "params": {"gather": gather}}
    stages = [
        {
            "name": "head",
            "data": {"train": "train", "validate": "val", "batch_size": 5},
            "teacher": {"model": "teacher"},
            "student": {"model": "student"},
            "auxiliary": {"teacher_head": head},
            "criterion": {"rotations": {**rotations, "inputs": {"embeddings": "teacher_head"}}},
            "optimizer": SGD,
        },
        {
            "name": "sskd",
            "auxiliary": {
                "teacher_head": {"reuse": "teacher_head", "frozen": True},
                "student_head": {"type": "SSKDHead", "inputs": {"features": "student.relu"}},
                **(more or {}),
            },
            "criterion": criterion or {"sskd": loss},
        },
    ]
    data = {"type": "ToyData", "params": {"size": 20, "shape": [1, SIDE, SIDE]}}
    experiment = toy_experiment(
        folder,
        *stages,
        datasets={"train": {**data, "wrappers": ["Rotations"]}, "val": data},
        models={
            "teacher": {"type": "ToyConvNet", "params": {"width": 6}},
            "student": {"type": "ToyConvNet", "params": {"width": 3}},
        },
        observers=["ResultFiles", "Stop"],
    )
    offered = {
        "losses": distill_crd.distill_losses(),
        "auxiliary_modules": distill_crd.distill_auxiliary_modules(),
        "dataset_wrappers": distill_crd.distill_dataset_wrappers(),
        "observers": {"Stop": Stop},
    }
    distill.run(experiment, registry=toy_registry(**offered), runs=folder)


def weights(folder):
    files = sorted(folder.rglob("last.safetensors"))
    assert files
    return {f"{file.parent.name} {n}": v for file in files for n, v in load_file(file).items()}


def difference(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_both(folder)
    return folder


def test_both_stages_train_and_plain_images_are_measured(uninterrupted):
    lines = (uninterrupted / "none/toy/metrics.jsonl").read_text("utf-8").splitlines()
    epochs = [event for event in map(json.loads, lines) if event["event"] == "epoch"]
    losses = [(epoch["stage"], *epoch["losses"].values()) for epoch in epochs]
    assert [stage for stage, *_ in losses] == ["head"] * 2 + ["sskd"] * 2
    assert losses[3][1] < losses[2][1]
    results = json.loads((uninterrupted / "none/toy/results.json").read_text("utf-8"))
    assert [stage["stage"] for stage in results] == ["head", "sskd"]
    assert "accuracy" in results[-1]["validation"]


@pytest.mark.parametrize("stage", ["head", "sskd"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(stage, uninterrupted, tmp_path):
    Stop.stage = stage
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    run(tmp_path)
    assert difference(uninterrupted / "none", tmp_path) == 0


def test_two_processes_train_what_one_does_where_all_are_gathered(uninterrupted, tmp_path):
    """Each batch of 5 is shared out as 2 and 3."""
    run_processes(__file__, str(tmp_path))
    assert difference(uninterrupted / "all", tmp_path / "all") < ROUNDING
    assert difference(uninterrupted / "none", tmp_path / "none") > 1e3 * ROUNDING
    assert difference(uninterrupted / "none", uninterrupted / "all") == 0


def test_terms_of_their_own_train_as_the_whole_does(tmp_path):
    """Without the divergence on originals, for which there is distill-kd."""
    own = {"student": "rows.originals"}
    parts = {
        "ce": {"type": "CrossEntropyLoss", "inputs": own},
        "ss": {"type": "SSKDSimilarityLoss", "inputs": EMBEDDINGS, "weight": 10.0},
        "tf": {"type": "SSKDTransformedLoss", "params": {"ratio": 0.5}, "weight": 2.7},
    }
    rows = {"rows": {"type": "SplitViews", "inputs": {"features": "student"}}}
    params = {"tf_ratio": 0.5, "loss_weights": [1.0, 0.0, 10.0, 2.7]}
    whole = {"sskd": {"type": "SSKDLoss", "params": params, "inputs": EMBEDDINGS}}
    run(tmp_path / "parts", criterion=parts, more=rows)
    run(tmp_path / "whole", criterion=whole)
    assert difference(tmp_path / "parts", tmp_path / "whole") < 1e-4


def run_both(folder: Path) -> None:
    for gather in ("none", "all"):
        run(folder / gather, gather)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_both(Path(sys.argv[1]))
