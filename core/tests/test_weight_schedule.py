"""The weight of a term over a stage."""

import math

import pytest
import torch
from torch import nn

from distill import Observer
from distill import run as distill_run
from distill.model.criterion import Criterion
from distill.model.wiring import Address, Call
from distill.testing import toy_experiment, toy_registry
from distill.weight_schedule import WeightSchedule


def epochs(schedule, count):
    return [schedule.at(epoch, 999) for epoch in range(count)]


def test_a_ramp_is_that_of_dkd():
    schedule = WeightSchedule(over=20)
    assert epochs(schedule, 30) == pytest.approx([min(n / 20, 1.0) for n in range(1, 31)])


def test_without_a_ramp_the_weight_is_its_end():
    assert epochs(WeightSchedule(start=3.0, end=2.0), 3) == [2.0, 2.0, 2.0]


def test_a_ramp_begins_after_and_the_weight_ends_with_stop():
    schedule = WeightSchedule(start=1.0, end=3.0, over=2, after=2, stop=6)
    assert epochs(schedule, 8) == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 0.0, 0.0]


def test_a_jump_comes_after():
    assert epochs(WeightSchedule(start=0.5, end=2.0, after=2), 4) == [0.5, 0.5, 2.0, 2.0]


def test_half_a_wave_has_the_ends_and_the_middle_of_a_line():
    schedule = WeightSchedule(start=1.0, end=0.0, over=4, shape="cosine")
    expected = [0.8535533906, 0.5, 0.1464466094, 0.0, 0.0]
    assert epochs(schedule, 5) == pytest.approx(expected)


def test_steps_are_counted_over_the_stage():
    schedule = WeightSchedule(over=4, unit="steps")
    assert [schedule.at(9, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


class Given(nn.Module):
    """A loss that is what it is given."""

    def forward(self, value):
        return value


def criterion(**weights):
    """Terms ``a``, ``b`` ... of 1, 10 ..., so that the total tells each one's weight."""
    values = {name: torch.tensor(10.0**n) for n, name in enumerate(weights)}
    terms = [Call(name, Given(), {"value": Address(name, name)}) for name in weights]
    return Criterion(terms, weights), values


def totals(made, positions):
    module, values = made
    seen = []
    for epoch, step in positions:
        module.set_position(epoch, step)
        losses = module(values)
        assert {name: losses[name] for name in values} == values
        seen.append(losses["total"].item())
    return seen


def test_a_scheduled_term_has_its_weight_of_the_epoch_in_the_total_and_is_told_without():
    made = criterion(a=2.0, b=WeightSchedule(over=4))
    found = totals(made, [(epoch, 17) for epoch in range(6)])
    assert found == pytest.approx([2 + 10 * w for w in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])
    assert made[0].is_scheduled


def test_a_scheduled_term_has_its_weight_of_the_step_in_the_total():
    made = criterion(a=WeightSchedule(1.0, 0.0, over=2, after=1, unit="steps"), b=0.5)
    found = totals(made, [(7, step) for step in range(4)])
    assert found == pytest.approx([1 + 5, 0.5 + 5, 0 + 5, 0 + 5])


def test_several_terms_change_each_by_its_own_schedule():
    cosine = WeightSchedule(start=0.0, end=2.0, over=3, shape="cosine")
    made = criterion(a=cosine, b=WeightSchedule(start=1.0, end=1.0, stop=2), c=1.0)
    found = totals(made, [(epoch, 0) for epoch in range(4)])
    a = [1 - math.cos(math.pi * min(n / 3, 1)) for n in (1, 2, 3, 4)]
    assert found == pytest.approx([a[n] + 10 * b + 100 for n, b in enumerate((1, 1, 0, 0))])
    assert totals(made, [(0, 0)]) == found[:1]  # back to where a resumed stage may begin


def test_constant_weights_are_those_of_every_position():
    made = criterion(a=0.5, b=3.0)
    assert totals(made, [(0, 0), (3, 99)]) == [30.5, 30.5]
    assert not made[0].is_scheduled


def test_gradients_are_weighed_as_the_total_is():
    module, values = criterion(a=1.0, b=WeightSchedule(over=5))
    values = {name: value.requires_grad_() for name, value in values.items()}
    module.set_position(1, 0)
    module(values)["total"].backward()
    assert [value.grad.item() for value in values.values()] == pytest.approx([1.0, 0.4])


class Losses(Observer):
    """Keeps the losses of each step."""

    def __init__(self):
        self.seen = []

    def step_end(self, event):
        self.seen.append(event.losses)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"over": 4}, [0.25] * 3 + [0.5] * 3),
        ({"over": 4, "unit": "steps"}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"start": 1.0, "end": 1.0, "stop": 1}, [1.0] * 3 + [0.0] * 3),
        ({"start": 2.0, "end": 1.0, "after": 4, "unit": "steps"}, [2.0] * 4 + [1.0] * 2),
    ],
)
def test_a_stage_trains_each_step_with_the_weight_of_its_position(tmp_path, schedule, expected):
    """Two epochs of three steps."""
    watching = Losses()
    terms = {
        "ce": {"type": "CrossEntropyLoss"},
        "again": {"type": "CrossEntropyLoss", "weight": schedule},
    }
    experiment = toy_experiment(tmp_path, {"criterion": terms}, log_every=1, observers=["Losses"])
    registry = toy_registry(observers={"Losses": lambda: watching})
    distill_run(experiment, registry=registry, runs=tmp_path)
    weights = [(losses["total"] - losses["ce"]) / losses["again"] for losses in watching.seen]
    assert weights == pytest.approx(expected)
