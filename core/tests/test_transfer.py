"""Batches that are copied a step ahead: each one arrives once, in order, with what it holds."""

from contextlib import nullcontext

import pytest
import torch

from distill.data.batch import Batch
from distill.training.transfer import copied_ahead

CPU = torch.device("cpu")


def batches(count):
    return [
        Batch({"image": torch.full((2, 3), float(n))}, torch.tensor([n, n]), torch.arange(2) + n)
        for n in range(count)
    ]


class Stream:
    """Stands in for a stream: notes in which order copies are made and waited for."""

    def __init__(self, noted):
        self.noted, self.made = noted, 0

    def record_event(self):
        self.made += 1
        self.noted.append(("copied", self.made - 1))
        return self.made - 1

    def wait_event(self, event):
        self.noted.append(("waited", event))


@pytest.fixture
def noted(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(found))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(found))
    return found


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_batch_arrives_once_and_in_order(count, noted):
    given = batches(count)
    arrived = list(copied_ahead(given, CPU, None))
    assert [batch.index.tolist() for batch in arrived] == [b.index.tolist() for b in given]
    assert all(
        torch.equal(a.inputs["image"], b.inputs["image"])
        for a, b in zip(arrived, given, strict=True)
    )


def test_the_next_batch_is_copied_before_this_one_is_worked_on(noted):
    for number, _ in enumerate(copied_ahead(batches(3), CPU, None)):
        noted.append(("worked", number))
    assert noted == [
        *(("copied", 0), ("copied", 1), ("waited", 0), ("worked", 0)),
        *(("copied", 2), ("waited", 1), ("worked", 1)),
        *(("waited", 2), ("worked", 2)),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_whole_on_a_gpu():
    given = [batch.pin_memory() for batch in batches(5)]
    device = torch.device("cuda")
    for number, batch in enumerate(copied_ahead(given, device, None)):
        assert batch.inputs["image"].device.type == "cuda"
        assert batch.inputs["image"].unique().tolist() == [float(number)]
