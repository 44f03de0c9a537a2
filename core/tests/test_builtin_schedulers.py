import pytest
import torch
from torch import nn, optim

from distill import builtin
from distill.builtin.schedulers import WarmupPolynomialLR
from distill.signature import bind


def optimizer(*rates):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return optim.SGD(groups, lr=1.0)


def rates(scheduler, steps):
    """The first group's rate before each step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_it_is_on_offer_and_built_from_a_file():
    assert builtin.distill_schedulers()["WarmupPolynomialLR"] is WarmupPolynomialLR
    binding = bind(WarmupPolynomialLR, {"total_iters": 5, "power": 2}, provided=1)
    assert binding.problems == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"total_iters": 4}, [8, 6, 4, 2, 0, 0]),
        ({"total_iters": 4, "power": 2.0}, [8, 4.5, 2, 0.5, 0, 0]),
        ({"total_iters": 4, "end_factor": 0.5}, [8, 7, 6, 5, 4, 4]),
        ({"total_iters": 6, "warmup_iters": 2}, [0, 4, 8, 6, 4, 2, 0, 0]),
        (
            {"total_iters": 6, "warmup_iters": 4, "start_factor": 0.5, "end_factor": 0.25},
            [4, 5, 6, 7, 8, 5, 2, 2],
        ),
        ({"total_iters": 2, "warmup_iters": 1, "start_factor": 2.0}, [16, 8, 0, 0]),
    ],
)
def test_rates_are_these(params, expected):
    scheduler = WarmupPolynomialLR(optimizer(8.0), **params)
    assert rates(scheduler, len(expected)) == pytest.approx(expected, abs=1e-12)


def test_every_group_goes_its_own_way_in_proportion():
    both = optimizer(8.0, 0.8)
    scheduler = WarmupPolynomialLR(both, total_iters=5, warmup_iters=2, power=0.9)
    for _ in range(7):
        first, second = (group["lr"] for group in both.param_groups)
        assert second == pytest.approx(first / 10)
        both.step()
        scheduler.step()


@pytest.mark.parametrize("stopped", [0, 1, 3, 5, 9])
def test_a_saved_and_loaded_scheduler_goes_on_exactly(stopped):
    params = {"total_iters": 7, "warmup_iters": 3, "power": 0.9, "start_factor": 0.1}
    straight = rates(WarmupPolynomialLR(optimizer(0.3), **params), 12)
    first = WarmupPolynomialLR(optimizer(0.3), **params)
    begun = rates(first, stopped)
    other = optimizer(0.3)
    second = WarmupPolynomialLR(other, **params)
    other.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + rates(second, 12 - stopped) == straight


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"total_iters": 0}, r"from 0 to below total_iters \(0\), got 0"),
        ({"total_iters": 5, "warmup_iters": 5}, r"below total_iters \(5\), got 5"),
        ({"total_iters": 5, "warmup_iters": -1}, "got -1"),
        ({"total_iters": 5, "power": 0.0}, "power must be positive, got 0.0"),
        ({"total_iters": 5, "end_factor": -0.1}, "cannot be negative, got 0.0 and -0.1"),
        ({"total_iters": 5, "start_factor": -1.0}, "cannot be negative, got -1.0 and 0.0"),
    ],
)
def test_parameters_out_of_range_are_an_error_in_words(params, said):
    with pytest.raises(ValueError, match=said):
        WarmupPolynomialLR(optimizer(0.1), **params)
