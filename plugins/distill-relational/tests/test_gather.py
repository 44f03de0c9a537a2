"""With ``gather: all``, two processes train what one does, though each has a part of the batch.

The student is a network for each way to relate samples, and each network has a term of its own.
Batches are of 7 samples and the last one is of 6, so that processes have 3 and 4 of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import distill
import distill_relational as relational
from distill.testing import ToyConvNet, run_processes, toy_experiment, toy_registry

WAYS = {
    "distance": {"type": "RKDDistanceLoss"},
    "angle": {"type": "RKDAngleLoss"},
    "distance_and_angle": {"type": "RKDLoss"},
    "pkt": {"type": "PKTLoss", "weight": 1e4},
    "spkd": {"type": "SPKDLoss", "weight": 1e2},
    "cckd": {"type": "CCKDLoss", "weight": 1e2},
    "neighbours": {"type": "CCKDLoss", "params": {"form": "code"}, "weight": 0.1},
    "ickd": {"type": "ICKDLoss", "params": {"reduction": "batch_squared"}, "weight": 10.0},
}
"""By name a term of the criterion, without its inputs."""
EMBEDDED = ("cckd", "neighbours")
ROUNDING = 1e-6


class Networks(nn.Module):
    """A network for each of the ways, which share their input and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        for name in WAYS:
            self.add_module(name, ToyConvNet())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(inputs) for network in self.children()]).sum(0)


def term(name, gather):
    references = {"student": f"student.{name}.relu", "teacher": "teacher.relu"}
    if name in EMBEDDED:
        references = {side: f"{name}_{side}" for side in references}
    return {
        **WAYS[name],
        "params": {**WAYS[name].get("params", {}), "gather": gather},
        "inputs": {f"{side}_features": value for side, value in references.items()},
    }


def embeddings():
    references = {
        f"{name}_{side}": {"student": f"student.{name}.relu", "teacher": "teacher.relu"}[side]
        for name in EMBEDDED
        for side in ("student", "teacher")
    }
    return {
        name: {"type": "CCKDEmbedding", "inputs": {"features": reference}}
        for name, reference in references.items()
    }


def train(folder, gather):
    """Train all networks for an epoch, in as many processes as there are."""
    experiment = toy_experiment(
        folder / gather,
        {
            "epochs": 1,
            "data": {"train": "train", "batch_size": 7},
            "teacher": {"model": "teacher"},
            "student": {"model": "networks"},
            "auxiliary": embeddings(),
            "criterion": {name: term(name, gather) for name in WAYS},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
        datasets={"train": {"type": "ToyData", "params": {"size": 20, "shape": [1, 3, 3]}}},
        models={"teacher": {"type": "ToyConvNet", "seed": 1}, "networks": {"type": "Networks"}},
    )
    registry = toy_registry(
        models={"Networks": Networks},
        losses=relational.distill_losses(),
        auxiliary_modules=relational.distill_auxiliary_modules(),
    )
    distill.run(experiment, registry=registry, runs=folder / gather)


def weights(folder, gather):
    return load_file(folder / gather / "toy" / "stage0" / "last.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what one process has trained, and what two have with gathering and without."""
    folder = tmp_path_factory.mktemp("one")
    train(folder, "all")
    others = tmp_path_factory.mktemp("two")
    run_processes(__file__, str(others))
    return weights(folder, "all"), weights(others, "all"), weights(others, "none")


def apart(ours, theirs, way):
    own = [name for name in ours if name.startswith(f"{way}.")]
    assert own
    return max((ours[name] - theirs[name]).abs().max().item() for name in own)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_that_gather_train_what_one_does(trained, way):
    one, gathered, _ = trained
    assert apart(gathered, one, way) < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_that_do_not_gather_see_other_relations(trained, way):
    one, _, parted = trained
    assert apart(parted, one, way) > 100 * ROUNDING


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in ("all", "none"):
        train(Path(sys.argv[1]), chosen)
