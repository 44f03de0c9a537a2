"""CRD trains, goes on where it stopped, and over two processes, which run this file too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import distill
import distill_crd
from distill.testing import run_processes, toy_experiment, toy_registry
from distill_crd import CRDLoss

EMBEDDINGS = {
    side: {
        "type": "CRDEmbedding",
        "params": {"out_features": 4},
        "inputs": {"features": f"{side.split('_')[0]}.body"},
    }
    for side in ("student_embedding", "teacher_embedding")
}
INPUTS = {**dict(zip(EMBEDDINGS, EMBEDDINGS, strict=True)), "index": "index"}


class Stop(distill.Observer):
    """Ends a run when its second epoch is over, before it is saved; once."""

    due = False

    def epoch_end(self, event: distill.EpochEnd) -> None:
        if Stop.due and event.position.epoch == 2:
            Stop.due = False
            raise KeyboardInterrupt


class Compared(CRDLoss):
    """Looks whether all processes have the same banks, to the last bit."""

    steps_seen = 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().forward(*args, **kwargs)
        banks = [bank.clone() for bank in (self.student_bank, self.teacher_bank, self.constants)]
        for bank in banks:
            everyone = [torch.empty_like(bank) for _ in range(2)]
            if torch.distributed.is_initialized():
                torch.distributed.all_gather(everyone, bank)
                assert torch.equal(*everyone)
        Compared.steps_seen += 1
        return loss


def run(
    folder: Path, runs: str, type_: str = "CRDLoss", epochs: int = 3, **params: Any
) -> dict[str, torch.Tensor]:
    """Train some epochs with batches of 5, of which the last is of one sample alone."""
    crd = {"type": type_, "params": {"negatives": 6, **params}, "inputs": INPUTS, "weight": 0.8}
    stage = {
        "epochs": epochs,
        "data": {"train": "train", "validate": None, "batch_size": 5},
        "teacher": {"model": "wide"},
        "auxiliary": EMBEDDINGS,
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, "crd": crd},
    }
    datasets = {"train": {"type": "ToyData", "params": {"size": 21}}}
    toy_experiment(folder, stage, datasets=datasets, observers=["Stop"])
    registry = toy_registry(
        losses={"CRDLoss": CRDLoss, "Compared": Compared},
        auxiliary_modules=distill_crd.distill_auxiliary_modules(),
        observers={"Stop": Stop},
    )
    distill.run(distill.load(folder / "toy.yaml"), registry=registry, runs=folder / runs)
    state = torch.load(folder / runs / "toy/checkpoint.pt", weights_only=True)["parts"]
    parts = {f"{part}.{name}": v for part, s in state.items() for name, v in s.items()}
    return {**load_file(folder / runs / "toy/stage0/last.safetensors"), **parts}


def test_a_run_stopped_in_the_middle_ends_with_the_same_weights_and_banks(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole")
    Stop.due = True
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "stopped")
    stopped = run(tmp_path, "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert whole["losses|stage0|crd.steps"] == 3 * 5


@pytest.mark.parametrize("params", [{}, {"queue": 8}], ids=["banks", "queue"])
def test_two_processes_train_what_one_does_and_have_the_same_banks(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    given = {"epochs": 2, **params}  # training amplifies rounding with every step
    one = run(tmp_path, "one", **given)
    run_processes(__file__, str(tmp_path), *(f"{k}={v}" for k, v in given.items()))
    two = torch.load(tmp_path / "two.pt")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = {k: int(v) for k, v in (text.split("=") for text in sys.argv[2:])}
    trained = run(Path(sys.argv[1]), "two", "Compared", **given)
    assert Compared.steps_seen > given["epochs"] * 5  # and those before training
    if torch.distributed.get_rank() == 0:
        torch.save(trained, Path(sys.argv[1]) / "two.pt")
