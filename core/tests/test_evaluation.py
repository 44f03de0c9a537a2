import numpy
import pytest
import torch
from torch import nn

from distill import distributed
from distill.builtin.accuracy import accuracy
from distill.data.loader import Loading
from distill.data.source import Source
from distill.testing import ToyConvNet, ToyData, ToyMLP
from distill.training.evaluation import Evaluating, evaluate

CPU = torch.device("cpu")


def how(batch_size, **more):
    return Evaluating(batch_size, CPU, **more)


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
        self.own = list(self.positions)
        return self.own

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
    measured = evaluate(model, Source("d", data), {"accuracy": accuracy()}, how(5))
    assert measured == {"accuracy": right.sum().item() / 23}


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_every_sample_counts_once_whatever_the_batch_size(batch_size):
    seen = Seen()
    source = Source("d", ToyData(23))
    measured = evaluate(model_of(), source, {"seen": seen}, how(batch_size))
    assert sorted(seen.positions) == list(range(23))
    assert measured == {"seen": 23.0}


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize(("size", "world"), [(23, 2), (1, 2), (13, 4)])
def test_every_sample_counts_once_over_all_processes(monkeypatch, size, world, in_step):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    states = []
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [*states, own])
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values, device: values + 1)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seen = Seen()
        source = Source("d", ToyData(size))
        evaluate(model_of(), source, {"seen": seen}, how(4, in_step=in_step))
        states.append(seen.own)
    assert sorted(seen.positions) == list(range(size))


def test_metrics_are_reset_first_and_given_as_plain_numbers():
    seen = Seen()
    for _ in range(2):
        measured = evaluate(model_of(), Source("d", ToyData(6)), {"seen": seen}, how(4))
    assert measured == {"seen": 6.0}
    assert type(measured["seen"]) is float


def test_the_model_is_in_eval_mode_meanwhile_and_each_module_back_in_its_own_after():
    model = model_of(cls=ToyConvNet)
    model.train()
    model.norm.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    source = Source("d", ToyData(6, shape=(1, 4, 4)))
    evaluate(model, source, {"seen": Seen()}, how(4))
    assert model.training
    assert model.conv.training
    assert not model.norm.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_nothing_is_dropped_though_the_model_was_training():
    seen, model, data = Seen(), model_of(dropout=0.9), ToyData(6)
    evaluate(model.train(), Source("d", data), {"seen": seen}, how(6))
    assert torch.equal(seen.output, model.eval()(data.inputs))


def test_modes_are_back_even_after_an_error():
    model = nn.Linear(99, 3).train()
    with pytest.raises(RuntimeError):
        evaluate(model, Source("d", ToyData(6)), {}, how(4))
    assert model.training


def test_no_graph_is_built():
    seen = Seen()
    evaluate(model_of(), Source("d", ToyData(6)), {"seen": seen}, how(4))
    assert not seen.output.requires_grad


def test_reduced_precision_is_what_the_model_runs_in():
    seen = Seen()
    evaluate(
        model_of(),
        Source("d", ToyData(6)),
        {"seen": seen},
        how(4, autocast=torch.bfloat16),
    )
    assert seen.output.dtype == torch.bfloat16


class Comparing(Seen):
    """Wants the teachers' outputs, and the classes."""

    teacher = "big"
    classes = None

    def update(self, output, batch, teachers):
        super().update(output, batch)
        self.teachers = teachers


def test_a_metric_that_compares_is_given_the_teachers_outputs():
    data, student, teacher = ToyData(6), model_of(), model_of(1, hidden=5)
    teacher.train()
    seen, comparing = Seen(), Comparing()
    metrics = {"seen": seen, "comparing": comparing}
    measured = evaluate(student, Source("d", data), metrics, how(6), {"big": teacher})
    assert measured == {"seen": 6.0, "comparing": 6.0}
    assert list(comparing.teachers) == ["big"]
    assert torch.equal(comparing.teachers["big"], teacher(data.inputs))
    assert torch.equal(comparing.output, student(data.inputs))
    assert teacher.training
    assert not hasattr(seen, "teachers")


def test_teachers_do_not_run_for_metrics_that_do_not_compare():
    fails = nn.Linear(99, 3)
    data = Source("d", ToyData(6))
    assert evaluate(model_of(), data, {"seen": Seen()}, how(4), {"big": fails}) == {"seen": 6.0}


def test_a_metric_that_asks_is_told_the_classes_of_the_data():
    comparing = Comparing()
    evaluate(model_of(), Source("d", ToyData(6)), {"c": comparing}, how(4), {"big": model_of()})
    assert comparing.classes == ["class 0", "class 1", "class 2"]
    evaluate(model_of(), Source("d", list(ToyData(6))), {"c": comparing}, how(4), {})
    assert comparing.classes is None


def test_a_metric_of_several_values_gives_each_by_name():
    class Several(Seen):
        def compute(self):
            return {"first": numpy.float64(self.positions[0]), "size": len(self.positions)}

    measured = evaluate(model_of(), Source("d", ToyData(6)), {"m": Several()}, how(4))
    assert measured == {"m/first": 0.0, "m/size": 6.0}
    assert all(type(value) is float for value in measured.values())


def test_what_cannot_be_read_does_not_count_where_that_is_asked_for():
    class Torn(ToyData):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("torn")
            return super().__getitem__(index)

    skipping = how(4, loading=Loading(on_bad_sample="skip"))
    measured = evaluate(model_of(), Source("d", Torn(6)), {"seen": Seen()}, skipping)
    assert measured == {"seen": 5.0, "skipped": 1.0}


def test_images_are_in_the_memory_format_asked_for():
    given = []

    class Watching(ToyConvNet):
        def forward(self, inputs):
            given.append(inputs.is_contiguous(memory_format=torch.channels_last))
            return super().forward(inputs)

    shape = (3, 4, 4)
    model = Watching()
    model.conv = nn.Conv2d(3, 4, 3, padding=1)
    source = Source("d", ToyData(4, shape=shape))
    evaluate(model, source, {}, how(4, memory_format=torch.channels_last))
    assert given == [True]
