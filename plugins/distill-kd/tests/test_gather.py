"""With ``gather: all``, two processes train what one does, though each has a part of the batch.

Batches are of 7 samples and the last one is of 6, so that processes have 3 and 4 of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distill
import distill_kd
from distill.testing import run_processes, toy_experiment, toy_registry

CHOICES = ("all", "none")
ROUNDING = 1e-6


def train(folder):
    """Train a student with each of the choices for an epoch, in as many processes as there are."""
    stages = [
        {
            "epochs": 1,
            "data": {"train": "train", "batch_size": 7},
            "teacher": {"model": "teacher"},
            "student": {"model": gather},
            "criterion": {"dist": {"type": "DISTLoss", "params": {"gather": gather}}},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        }
        for gather in CHOICES
    ]
    experiment = toy_experiment(
        folder,
        *stages,
        datasets={"train": {"type": "ToyData", "params": {"size": 20, "shape": [1, 3, 3]}}},
        models={name: {"type": "ToyConvNet"} for name in ("teacher", *CHOICES)},
    )
    registry = toy_registry(losses=distill_kd.distill_losses())
    distill.run(experiment, registry=registry, runs=folder)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Return how far two processes end from one, by choice."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train(one)
    run_processes(__file__, str(two))
    return {
        gather: difference(*(folder / "toy" / f"stage{number}" for folder in (one, two)))
        for number, gather in enumerate(CHOICES)
    }


def difference(*stages):
    ours, theirs = (load_file(folder / "last.safetensors") for folder in stages)
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_two_processes_that_gather_train_what_one_does(apart):
    assert apart["all"] < ROUNDING


def test_two_processes_that_do_not_gather_see_other_samples(apart):
    assert apart["none"] > 100 * ROUNDING


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
