"""A stage's learning-rate schedulers: one, several in a row, or several at once."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from distill.testing import toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.optimizer import build_optimization, build_schedule
from distill.training.schedule import watches

PLATEAU = {"type": "ReduceLROnPlateau", "params": {"mode": "max", "factor": 0.1, "patience": 0}}
WARMUP = {"type": "LinearLR", "params": {"start_factor": 0.25, "total_iters": 3}}
HALVING = {"type": "ExponentialLR", "params": {"gamma": 0.5}}


class Rates:
    """The learning rates of an optimizer over a schedule."""

    def __init__(self, folder, scheduler, lrs=(1.0,), **stage):
        parameters = [nn.Parameter(torch.ones(1)) for _ in lrs]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, lrs, strict=True)]
        self.optimizer = torch.optim.SGD(groups, lr=1.0)
        experiment = toy_experiment(folder, {"scheduler": scheduler, **stage})
        builder = Builder(experiment, toy_registry())
        self.schedule = build_schedule(builder, experiment.stages[0], self.optimizer)

    def now(self):
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return rates[0] if len(rates) == 1 else rates

    def over(self, count, unit="epochs", first=0):
        """The rate of each epoch (or step)."""
        rates = []
        for done in range(first + 1, first + count + 1):
            rates.append(self.now())
            self.optimizer.step()
            self.schedule.advance(unit, done)
        return rates


def torchs(make, count):
    """The rates that torch's own scheduler gives."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_without_a_scheduler_there_is_no_schedule(tmp_path):
    assert Rates(tmp_path, None).schedule is None


def test_a_scheduler_steps_once_an_epoch(tmp_path):
    scheduler = {"type": "MultiStepLR", "params": {"milestones": [1, 3], "gamma": 0.1}}
    assert Rates(tmp_path, scheduler).over(4) == pytest.approx([1.0, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(("unit", "other"), [("epochs", "steps"), ("steps", "epochs")])
def test_a_scheduler_steps_in_its_unit_alone(tmp_path, unit, other):
    rates = Rates(tmp_path, {**HALVING, "unit": unit})
    assert rates.over(3, other) == [1.0, 1.0, 1.0]
    assert rates.over(3, unit) == [1.0, 0.5, 0.25]


def test_a_scheduler_is_torchs_own_to_the_bit(tmp_path):
    scheduler = {"type": "CosineAnnealingLR", "params": {"T_max": 7}, "unit": "steps"}
    assert Rates(tmp_path, scheduler).over(7, "steps") == torchs(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 7), 7
    )


def test_each_of_a_row_starts_from_the_rates_of_the_file(tmp_path):
    row = [{**WARMUP, "until": 3}, {**HALVING, "until": 5}, HALVING]
    expected = [0.25, 0.5, 0.75, 1.0, 0.5, 1.0, 0.5, 0.25]
    assert Rates(tmp_path, row).over(8) == pytest.approx(expected)


def test_each_group_of_parameters_starts_from_its_own_rate(tmp_path):
    row = [{**WARMUP, "until": 1}, HALVING]
    rates = Rates(tmp_path, row, lrs=(1.0, 0.1)).over(3)
    assert rates == [pytest.approx(r) for r in ([0.25, 0.025], [1.0, 0.1], [0.5, 0.05])]


def test_a_row_may_hand_over_in_another_unit_than_the_next_one_counts(tmp_path):
    rates = Rates(tmp_path, [{**WARMUP, "unit": "steps", "until": 3}, HALVING])
    seen = []
    for epoch in range(3):
        seen += rates.over(2, "steps", first=2 * epoch)
        rates.schedule.advance("epochs", epoch + 1)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5, 0.5])


def test_one_that_takes_over_between_two_epochs_has_its_first_rate_in_the_next(tmp_path):
    """Warm-up by step for two whole epochs of two steps, then a schedule by epoch."""
    rates = Rates(tmp_path, [{**WARMUP, "unit": "steps", "until": 4}, HALVING])
    seen = []
    for epoch in range(4):
        seen += rates.over(2, "steps", first=2 * epoch)
        rates.schedule.advance("epochs", epoch + 1)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.5])


def test_without_until_all_act_at_once(tmp_path):
    rates = Rates(tmp_path, [WARMUP, HALVING]).over(4)
    assert rates == pytest.approx([0.25, 0.5 * 0.5, 0.75 * 0.25, 1.0 * 0.125])


def test_what_one_of_a_row_changed_beside_the_rate_is_undone(tmp_path):
    cycle = {"type": "OneCycleLR", "params": {"max_lr": 3.0, "total_steps": 4}, "until": 2}
    rates = Rates(tmp_path, [cycle, HALVING])
    momentum = rates.optimizer.param_groups[0]["momentum"]
    rates.over(2)
    assert momentum != 0
    group = rates.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (1.0, 0)
    assert "max_lr" not in group


def test_a_scheduler_that_watches_is_given_the_validation_metric(tmp_path):
    rates, seen = Rates(tmp_path, PLATEAU), []
    for epoch, accuracy in enumerate((0.5, 0.6, 0.6, 0.7)):
        rates.schedule.measured({"accuracy": accuracy})
        rates.schedule.advance("epochs", epoch + 1)
        seen.append(rates.now())
    assert seen == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_it_watches_the_metric_that_it_names_or_else_what_decides(tmp_path):
    metrics = ["accuracy", {"type": "accuracy", "params": {"top_k": 2}, "name": "top"}]
    given = [{"accuracy": 0.1, "top": 0.9}, {"accuracy": 0.2, "top": 0.8}]
    for entry, stage, expected in (
        ({**PLATEAU, "watch": "top"}, {}, 0.1),
        (PLATEAU, {"best_by": "top"}, 0.1),
        ({**PLATEAU, "watch": "accuracy"}, {"best_by": "top"}, 1.0),
        (PLATEAU, {}, 1.0),
    ):
        rates = Rates(tmp_path, entry, metrics=metrics, **stage)
        for measured in given:
            rates.schedule.measured(measured)
        assert rates.now() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR"])
def test_other_schedulers_are_not_given_a_metric(tmp_path, name):
    params = {"step_size" if name == "StepLR" else "T_max": 1}
    rates = Rates(tmp_path, {"type": name, "params": params})
    rates.optimizer.step()
    rates.schedule.measured({"accuracy": 0.9})
    assert rates.now() == 1.0
    rates.schedule.advance("epochs", 1)
    assert rates.now() < 1.0


def test_a_row_may_end_in_one_that_watches(tmp_path):
    rates, seen = Rates(tmp_path, [{**WARMUP, "until": 2}, PLATEAU]), []
    for epoch, accuracy in enumerate((0.9, 0.8, 0.5, 0.4, 0.3)):
        seen.append(rates.now())
        rates.optimizer.step()
        rates.schedule.measured({"accuracy": accuracy})
        rates.schedule.advance("epochs", epoch + 1)
    assert [*seen, rates.now()] == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.1, 0.01])


def test_what_watches_is_told_by_what_its_step_takes():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert watches(lr_scheduler.ReduceLROnPlateau(optimizer))
    assert not watches(lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "entries",
    [
        HALVING,
        [WARMUP, HALVING],
        [{**WARMUP, "until": 3}, {**HALVING, "until": 5}, HALVING],
        [{**WARMUP, "until": 2}, {"type": "CosineAnnealingLR", "params": {"T_max": 6}}],
        [
            {**HALVING, "until": 2},
            {"type": "OneCycleLR", "params": {"max_lr": 3.0, "total_steps": 9}},
        ],
    ],
)
def test_it_goes_on_from_a_saved_state_as_it_would_have(tmp_path, entries, stopped):
    whole = Rates(tmp_path, entries).over(8)
    first = Rates(tmp_path, entries)
    before = first.over(stopped)
    saved = copy.deepcopy((first.schedule.state_dict(), first.optimizer.state_dict()))
    again = Rates(tmp_path, entries)
    again.schedule.start_from(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.schedule.load_state_dict(saved[0])
    assert before + again.over(8 - stopped, first=stopped) == whole


def test_all_at_once_are_torchs_chained_scheduler_to_the_bit(tmp_path):
    cosine = {"type": "CosineAnnealingLR", "params": {"T_max": 6, "eta_min": 0.1}}
    entries = [WARMUP, cosine, HALVING]
    assert Rates(tmp_path, entries).over(8) == torchs(
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3),
                lr_scheduler.CosineAnnealingLR(optimizer, 6, 0.1),
                lr_scheduler.ExponentialLR(optimizer, 0.5),
            ]
        ),
        8,
    )


def sgd_with_momentum(folder, scheduler, module):
    stage = {
        "optimizer": {"type": "SGD", "params": {"lr": 1.0, "momentum": 0.8, "nesterov": True}},
        "scheduler": scheduler,
    }
    experiment = toy_experiment(folder, stage)
    builder = Builder(experiment, toy_registry())
    device = torch.device("cpu")
    return build_optimization(builder, experiment.stages[0], {"student": module}, device)


def advanced(optimization, weight, first, last, unit="epochs"):
    """The settings in force in each epoch, and the weight after it."""
    seen = []
    for done in range(first, last + 1):
        group = optimization.optimizer.param_groups[0]
        optimization.backward((weight * weight).sum())
        assert optimization.step()
        seen.append((group["lr"], group["momentum"], weight.detach().item()))
        optimization.schedule.advance(unit, done)
    return seen


ONE_CYCLE = {
    "type": "OneCycleLR",
    "params": {
        "max_lr": 4.0,
        "total_steps": 5,
        "pct_start": 0.5,
        "anneal_strategy": "linear",
        "div_factor": 4.0,
        "final_div_factor": 2.0,
        "base_momentum": 0.5,
        "max_momentum": 0.9,
    },
}


def test_a_cycle_of_rate_and_momentum_leaves_no_trace_in_the_next_phase(tmp_path):
    """Up from 1 to 4 within 1.5 epochs, down to 0.5 within 2.5; momentum the other way round."""
    module = nn.Linear(1, 1, bias=False)
    plain = dict(sgd_with_momentum(tmp_path, None, module).optimizer.param_groups[0])
    row = [{**ONE_CYCLE, "until": 3}, {**HALVING, "until": 5}, {**ONE_CYCLE}]
    optimization = sgd_with_momentum(tmp_path, row, module)
    seen = advanced(optimization, module.weight, 1, 3)
    rates, momenta = [1.0, 3.0, 4.0 - 0.5 / 2.5 * 3.5], [0.9, 0.9 - 0.4 / 1.5, 0.5 + 0.2 * 0.4]
    assert [rate for rate, _, _ in seen] == pytest.approx(rates)
    assert [momentum for _, momentum, _ in seen] == pytest.approx(momenta)
    group = optimization.optimizer.param_groups[0]
    assert {key for key in group if key not in plain} == {"initial_lr"}
    assert {key: group[key] for key in plain} == plain
    seen = advanced(optimization, module.weight, 4, 5)
    assert [numbers[:2] for numbers in seen] == [(1.0, 0.8), (0.5, 0.8)]
    seen = advanced(optimization, module.weight, 6, 8)
    assert [rate for rate, _, _ in seen] == pytest.approx(rates)
    assert [momentum for _, momentum, _ in seen] == pytest.approx(momenta)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
@pytest.mark.parametrize("stopped", range(1, 8))
def test_stopped_anywhere_a_fresh_optimizer_goes_on_with_the_same_numbers(tmp_path, stopped, unit):
    """Phases of 3, 2 and 3; rate, momentum and weights to the bit."""
    row = [
        {**ONE_CYCLE, "unit": unit, "until": 3},
        {**HALVING, "unit": unit, "until": 5},
        {"type": "CosineAnnealingLR", "params": {"T_max": 4, "eta_min": 0.1}, "unit": unit},
    ]

    def fresh():
        torch.manual_seed(0)
        module = nn.Linear(1, 1, bias=False)
        return module, sgd_with_momentum(tmp_path, row, module)

    module, optimization = fresh()
    whole = advanced(optimization, module.weight, 1, 8, unit)
    module, optimization = fresh()
    before = advanced(optimization, module.weight, 1, stopped, unit)
    saved, weights = copy.deepcopy(optimization.state_dict()), module.state_dict()
    again, resumed = fresh()
    advanced(resumed, again.weight, 1, 1, unit)  # what it has been through does not matter
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert before + advanced(resumed, again.weight, stopped + 1, 8, unit) == whole


def test_what_watches_goes_on_from_what_it_had_seen(tmp_path):
    """Patience 0 and mode max: halved after each accuracy that is not above the best."""
    plateau = {"type": "ReduceLROnPlateau", "params": {"mode": "max", "factor": 0.5, "patience": 0}}
    given, expected = [0.5, 0.6, 0.6, 0.55, 0.7], [1.0, 1.0, 0.5, 0.25, 0.25]

    def watched(optimization, accuracies):
        rates = []
        for accuracy in accuracies:
            optimization.schedule.measured({"accuracy": accuracy})
            optimization.schedule.advance("epochs", 1)
            rates.append(optimization.lr)
        return rates

    for stopped in range(1, 5):
        first = sgd_with_momentum(tmp_path, plateau, nn.Linear(1, 1))
        before = watched(first, given[:stopped])
        resumed = sgd_with_momentum(tmp_path, plateau, nn.Linear(1, 1))
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
        assert before + watched(resumed, given[stopped:]) == expected
