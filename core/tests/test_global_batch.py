"""Losses on the batch of all processes; this file is also what those processes run."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import distributed, gather, load, run
from distill.global_batch import shared_out
from distill.testing import run_processes, toy_experiment, toy_registry

SIZES = (2, 0, 3)
EACH = 2
"""Rows a sample."""


class Spread(nn.Module):
    """How far the samples of a batch lie apart: more than a mean over samples."""

    def __init__(self, everywhere=True):
        super().__init__()
        self.everywhere = everywhere

    def forward(self, student):
        rows = gather(student) if self.everywhere else student
        return torch.cdist(rows, rows).add(1e-3).sqrt().mean()


def rows(start, count):
    """Return rows as no others are."""
    return (torch.arange(start, start + count, dtype=torch.float64)[:, None] / 7).sin().exp() * (
        torch.tensor([1.0, 2.0])
    )


def curved(tensor):
    return (tensor[:, None] - tensor[None]).pow(3).sum() + tensor.pow(2).prod()


def test_alone_and_outside_of_training_it_is_the_tensor_itself():
    tensor = torch.ones(3)
    assert gather(tensor) is tensor
    with shared_out((3,)):
        assert gather(tensor) is tensor


def test_rows_that_are_no_multiple_of_the_samples_are_refused():
    with shared_out((2, 2)), pytest.raises(ValueError, match="3 rows cannot be gathered for 2"):
        gather(torch.ones(3))


def test_processes_get_all_rows_and_the_gradient_of_one_that_has_them():
    run_processes(__file__, processes=3)


def test_two_processes_train_with_a_loss_on_the_global_batch_what_one_does(tmp_path):
    """With batches of 5, 5, 5, 4 and then 1: the last is of one process alone."""
    data = {"train": "train", "validate": None, "batch_size": 5}
    datasets = {"train": {"type": "ToyData", "params": {"size": 21}}}
    terms = {"ce": {"type": "CrossEntropyLoss"}, "spread": {"type": "Spread"}}
    toy_experiment(tmp_path, {"data": data, "criterion": terms}, datasets=datasets)
    run_file(tmp_path, "one")
    run_processes(__file__, str(tmp_path))
    one, two = (
        load_file(tmp_path / runs / "toy/stage0/last.safetensors") for runs in ("one", "two")
    )
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6


def gathered():
    """Rows of all processes come in order, and each one gets the gradient of its own."""
    rank = distributed.rank()
    start, count = sum(SIZES[:rank]) * EACH, SIZES[rank] * EACH
    own = rows(start, max(count, EACH)).requires_grad_()  # with none left, one stands in
    everyone = rows(0, sum(SIZES) * EACH).requires_grad_()
    with shared_out(SIZES):
        found = gather(own)
        torch.testing.assert_close(found, everyone.detach(), rtol=0, atol=0)
        weight = SIZES[rank] * len(SIZES) / sum(SIZES)
        (curved(found) * weight).backward()
        numbers = torch.arange(start, start + max(count, EACH))
        assert gather(numbers).tolist() == list(range(sum(SIZES) * EACH))
    curved(everyone).backward()
    wanted = everyone.grad[start : start + count] * len(SIZES)  # DDP takes the mean
    torch.testing.assert_close(own.grad[:count], wanted)
    assert not own.grad[count:].any()


def run_file(folder, runs):
    registry = toy_registry(losses={"Spread": Spread})
    run(load(folder / "toy.yaml"), registry=registry, runs=folder / runs)
    assert load_file(folder / runs / "toy/stage0/last.safetensors")  # there for every process


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    if len(sys.argv) == 1:
        gathered()
    else:
        run_file(Path(sys.argv[1]), "two")
