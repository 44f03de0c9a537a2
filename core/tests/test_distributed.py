"""Processes that work together; this file is also what those processes run."""

import os

import pytest
import torch

from distill import DistillError, distributed
from distill.builtin.accuracy import accuracy
from distill.data.source import Source
from distill.testing import ToyData, ToyMLP, run_processes
from distill.training.evaluation import Evaluating, evaluate
from distill.training.metrics import Meter

CPU = torch.device("cpu")


def test_alone_every_function_works_without_a_group():
    values = [torch.ones(2)]
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.sum_over_ranks(values[0], CPU) is values[0]
    assert distributed.from_main("x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    distributed.broadcast_from_main(values)
    distributed.barrier()
    assert values[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("world", [None, "1"])
def test_a_single_process_forms_no_group(monkeypatch, world):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    distributed.join(CPU)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_without_a_gpu_the_device_is_the_cpu(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device(name) == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DistillError, match=rf"{name} was asked for, but torch sees no GPU"):
        distributed.device(name)


def test_each_process_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.device("auto") == torch.device("cuda:3")
    assert chosen == [torch.device("cuda:3")]


def test_processes_work_together():
    run_processes(__file__)


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match="No such file"):
        run_processes(os.path.join("gone", "script.py"), processes=1)


def exchange():
    """Collectives give every process the same."""
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.is_main() is (rank == 0)
    assert distributed.sum_over_ranks(torch.tensor([1.0, rank]), CPU).tolist() == [2.0, 1.0]
    assert distributed.from_main({"from": rank}) == {"from": 0}
    assert distributed.gather_objects(f"rank {rank}") == ["rank 0", "rank 1"]
    tensors = [torch.full((2,), float(rank)), torch.tensor(rank)]
    distributed.broadcast_from_main(tensors)
    assert [tensor.sum().item() for tensor in tensors] == [0.0, 0]


def measure():
    """Losses and metrics are those of all samples."""
    meter = Meter()
    meter.add({"ce": torch.tensor(1.0 + distributed.rank())}, 3 - 2 * distributed.rank())
    assert meter.read() == ({"ce": (3 * 1.0 + 1 * 2.0) / 4}, 4.0)
    torch.manual_seed(0)
    model, data = ToyMLP(), ToyData(23)
    found = evaluate(model, Source("d", data), {"a": accuracy()}, Evaluating(4, CPU))
    hits = (model(data.inputs).argmax(1) == torch.tensor(data.labels)).sum().item()
    assert found == {"a": hits / 23}


def join_again():
    """What joined stays: a process that is ahead does not knock at a door about to close."""
    for number in range(20):
        distributed.join(CPU)
        assert distributed.gather_objects(number) == [number, number]


if __name__ == "__main__":
    distributed.join(CPU)
    exchange()
    measure()
    join_again()
