import numpy
import pytest
import torch
from torch import nn

from distill import distributed
from distill.builtin.accuracy import accuracy
from distill.data.loader import Source
from distill.testing import ToyConvNet, ToyData, ToyMLP
from distill.training.evaluation import evaluate

CPU = torch.device("cpu")


class Seen:
    """A metric that lists positions and keeps what it was last given."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.positions = []

    def update(self, output, batch):
        self.positions += batch.index.tolist()
        self.output = output

    def state(self):
        return self.positions

    def merge(self, state):
        self.positions = self.positions + state

    def compute(self):
        return numpy.float64(len(self.positions))


def model_of(seed=0, cls=ToyMLP, **params):
    torch.manual_seed(seed)
    return cls(**params)


def test_accuracy_is_that_of_all_samples_at_once():
    model, data = model_of(), ToyData(23)
    right = model(data.inputs).argmax(1) == torch.tensor(data.labels)
    measured = evaluate(
        model, Source("d", data), {"accuracy": accuracy()}, batch_size=5, device=CPU
    )
    assert measured == {"accuracy": right.sum().item() / 23}


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_every_sample_counts_once_whatever_the_batch_size(batch_size):
    seen = Seen()
    source = Source("d", ToyData(23))
    measured = evaluate(model_of(), source, {"seen": seen}, batch_size=batch_size, device=CPU)
    assert sorted(seen.positions) == list(range(23))
    assert measured == {"seen": 23.0}


def test_every_sample_counts_once_over_all_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    states = []
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [*states, own])
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seen = Seen()
        evaluate(model_of(), Source("d", ToyData(23)), {"seen": seen}, batch_size=4, device=CPU)
        states.append(seen.state())
    assert sorted(seen.positions) == list(range(23))


def test_metrics_are_reset_first_and_given_as_plain_numbers():
    seen = Seen()
    for _ in range(2):
        measured = evaluate(
            model_of(), Source("d", ToyData(6)), {"seen": seen}, batch_size=4, device=CPU
        )
    assert measured == {"seen": 6.0}
    assert type(measured["seen"]) is float


def test_the_model_is_in_eval_mode_meanwhile_and_each_module_back_in_its_own_after():
    model = model_of(cls=ToyConvNet)
    model.train()
    model.norm.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    source = Source("d", ToyData(6, shape=(1, 4, 4)))
    evaluate(model, source, {"seen": Seen()}, batch_size=4, device=CPU)
    assert model.training
    assert model.conv.training
    assert not model.norm.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_nothing_is_dropped_though_the_model_was_training():
    seen, model, data = Seen(), model_of(dropout=0.9), ToyData(6)
    evaluate(model.train(), Source("d", data), {"seen": seen}, batch_size=6, device=CPU)
    assert torch.equal(seen.output, model.eval()(data.inputs))


def test_modes_are_back_even_after_an_error():
    model = nn.Linear(99, 3).train()
    with pytest.raises(RuntimeError):
        evaluate(model, Source("d", ToyData(6)), {}, batch_size=4, device=CPU)
    assert model.training


def test_no_graph_is_built():
    seen = Seen()
    evaluate(model_of(), Source("d", ToyData(6)), {"seen": seen}, batch_size=4, device=CPU)
    assert not seen.output.requires_grad


def test_reduced_precision_is_what_the_model_runs_in():
    seen = Seen()
    evaluate(
        model_of(),
        Source("d", ToyData(6)),
        {"seen": seen},
        batch_size=4,
        device=CPU,
        autocast=torch.bfloat16,
    )
    assert seen.output.dtype == torch.bfloat16
