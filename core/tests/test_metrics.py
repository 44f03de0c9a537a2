import math

import pytest
import torch

from distill import distributed
from distill.training.metrics import (
    Meter,
    compares_with,
    is_higher_better,
    merge_over_ranks,
    takes_teachers,
    values_by_name,
)


class Seen:
    """A metric that lists what it has seen."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.values = []

    def update(self, output, batch):
        self.values.append(output)

    def state(self):
        return list(self.values)

    def merge(self, state):
        self.values += state

    def compute(self):
        return float(len(self.values))


def test_meter_weighs_steps_by_their_samples():
    meter = Meter()
    meter.add({"ce": torch.tensor(1.0), "total": torch.tensor(10.0)}, 8)
    meter.add({"ce": torch.tensor(4.0), "total": torch.tensor(40.0)}, 4)
    assert meter.read() == ({"ce": 2.0, "total": 20.0}, 12.0)


def test_meter_forgets_what_was_read():
    meter = Meter()
    meter.add({"ce": torch.tensor(1.0)}, 8)
    meter.read()
    assert meter.read() == ({}, 0.0)
    meter.add({"ce": torch.tensor(3.0)}, 1)
    assert meter.read() == ({"ce": 3.0}, 1.0)


def test_meter_keeps_no_graph():
    meter = Meter()
    x = torch.ones(1, requires_grad=True)
    meter.add({"ce": x.sum()}, 1)
    assert not meter._losses[0][0]["ce"].requires_grad


def test_meter_sums_in_double_precision():
    meter = Meter()
    for value in [1e8, 1.0, 1.0, 1.0, 1.0]:
        meter.add({"ce": torch.tensor(value)}, 1)
    assert meter.read()[0]["ce"] == (1e8 + 4) / 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_meter_lets_a_single_bad_step_show(bad):
    meter = Meter()
    for value in (1.0, bad, 1.0):
        meter.add({"ce": torch.tensor(value)}, 1)
    assert not math.isfinite(meter.read()[0]["ce"])


def test_meter_is_the_mean_over_processes(monkeypatch):
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda sums, device: sums * 2)
    meter = Meter()
    meter.add({"ce": torch.tensor(3.0)}, 4)
    assert meter.read() == ({"ce": 3.0}, 8.0)


def test_a_process_without_samples_of_its_own_can_be_read():
    meter = Meter()
    meter.add({"ce": torch.tensor(3.0)}, 0)
    meter.add({"ce": torch.tensor(5.0)}, 2)
    assert meter.read() == ({"ce": 5.0}, 2.0)


def test_a_metric_is_given_what_every_rank_has_seen_in_their_order(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [["other"], own])
    metric = Seen()
    metric.update("own", None)
    merge_over_ranks(metric)
    assert metric.values == ["other", "own"]


def test_alone_a_metric_is_left_as_it_is():
    metric = Seen()
    metric.update("own", None)
    merge_over_ranks(metric)
    assert metric.values == ["own"]


class Comparing(Seen):
    """Compares with a teacher, gives several values, and is better when lower."""

    teacher = "big"
    higher_is_better = False

    def update(self, output, batch, teachers):
        pass

    def compute(self):
        return {"a": torch.tensor(0.5), "b": 1}


def test_what_a_metric_does_not_say_has_its_default():
    assert is_higher_better(Seen())
    assert compares_with(Seen()) is None
    assert not takes_teachers(Seen())


def test_a_metric_may_say_more_of_itself():
    assert not is_higher_better(Comparing())
    assert compares_with(Comparing()) == "big"
    assert takes_teachers(Comparing())


def test_several_values_are_named_parts_and_plain_numbers():
    values = values_by_name("m", Comparing())
    assert values == {"m/a": 0.5, "m/b": 1.0}
    assert [type(value) for value in values.values()] == [float, float]
