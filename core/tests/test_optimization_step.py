"""One update of the weights: accumulated, bounded, refused, scaled."""

import copy
import math

import pytest
import torch
from torch import nn

from distill.config.experiment import Clip
from distill.testing import ToyMLP
from distill.training.optimizer import Optimization


def linear_loss(parameters, gradients):
    """A loss with just these gradients."""
    return sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True))


def parameters_and(clip=None, scaler=None, lr=1.0):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    return parameters, Optimization(optimizer, scaler=scaler, clip=clip or Clip())


def moved_by(parameters, optimization, gradients):
    """What a step subtracts from each parameter."""
    before = [p.detach().clone() for p in parameters]
    optimization.backward(linear_loss(parameters, gradients))
    assert optimization.step() == "followed"
    return [old - p.detach() for old, p in zip(before, parameters, strict=True)]


def gradients_of_norm(norm):
    gradients = [torch.randn(2, 3), torch.randn(4)]
    own = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [g * (norm / own) for g in gradients]


def in_half(parameter):
    """A loss of 1 an element through fp16, whose gradient overflows above a scale of 65504."""
    return parameter.half().float().sum()


def test_several_backward_calls_are_one_of_their_weighted_sum():
    torch.manual_seed(0)
    inputs, targets = torch.randn(12, 4), torch.randint(3, (12,))
    whole, parts = ToyMLP(), ToyMLP()
    parts.load_state_dict(whole.state_dict())
    for _ in range(2):
        for model, sizes in ((whole, [12]), (parts, [5, 4, 3])):
            optimization = Optimization(torch.optim.SGD(model.parameters(), lr=0.1))
            for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
                loss = nn.functional.cross_entropy(model(x), y)
                optimization.backward(loss * len(x) / 12)
            assert optimization.step() == "followed"
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("norm", "bound"), [(10.0, 2.5), (0.5, 2.5)])
def test_the_bound_is_one_of_the_norm_over_all_parameters(norm, bound):
    parameters, optimization = parameters_and(Clip(norm=bound))
    gradients = gradients_of_norm(norm)
    moved = moved_by(parameters, optimization, gradients)
    factor = min(1.0, bound / norm)
    for step, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(step, gradient * factor, rtol=1e-5, atol=1e-6)


def test_the_bound_is_one_of_the_accumulated_gradient():
    parameters, optimization = parameters_and(Clip(norm=1.0))
    gradients = gradients_of_norm(2.0)
    optimization.backward(linear_loss(parameters, gradients))
    moved = moved_by(parameters, optimization, [0.5 * g for g in gradients])
    for step, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(step, gradient / 2.0)


def test_norm_comes_before_value_where_both_are_bounded():
    parameters, optimization = parameters_and(Clip(norm=2.0, value=0.7))
    gradients = gradients_of_norm(10.0)
    moved = moved_by(parameters, optimization, gradients)
    for step, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(step, (gradient / 5).clamp(-0.7, 0.7), rtol=1e-5, atol=1e-6)
    assert max(step.abs().max().item() for step in moved) == pytest.approx(0.7)


def test_under_a_scaler_bounds_are_those_of_the_unscaled_gradient():
    for clip in (Clip(norm=1.0), Clip(value=0.25)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plain, scaled = parameters_and(clip), parameters_and(clip, scaler)
        gradients = gradients_of_norm(3.0)
        for step, same in zip(
            moved_by(*plain, gradients), moved_by(*scaled, gradients), strict=True
        ):
            torch.testing.assert_close(step, same)


@pytest.mark.parametrize("clip", [Clip(), Clip(norm=1.0), Clip(value=1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.AdamW]
)
def test_one_element_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(make, bad, clip):
    parameters, _ = parameters_and()
    optimization = Optimization(make(parameters), clip=clip)
    for _ in range(2):
        optimization.backward(sum(p.square().sum() for p in parameters))
        assert optimization.step() == "followed"
    weights = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimization.optimizer.state_dict())
    gradients = [torch.zeros(2, 3), torch.ones(4)]
    gradients[0][1, 2] = bad
    optimization.backward(linear_loss(parameters, gradients))
    assert optimization.step() == "not finite"
    assert all(map(torch.equal, weights, parameters))
    after = optimization.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert after["state"].keys() == state["state"].keys() == {0, 1}
    for number, kept in state["state"].items():
        for name, value in kept.items():
            assert torch.equal(after["state"][number][name], value)


def test_an_overflow_of_a_finite_loss_halves_the_scale_and_leaves_the_weights():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimization = Optimization(optimizer, scaler=torch.amp.GradScaler("cpu"))
    loss = in_half(parameter)
    assert torch.isfinite(loss)
    optimization.backward(loss)
    assert optimization.step() == "overflow"
    assert parameter.tolist() == [1.0, -2.0]
    assert parameter not in optimizer.state
    assert optimization.scaler.get_scale() == 2.0**15
    optimization.backward(in_half(parameter))
    assert optimization.step() == "followed"
    assert parameter.detach() == pytest.approx(torch.tensor([0.9, -2.1]))
    assert optimization.scaler.get_scale() == 2.0**15


def test_an_overflow_in_one_of_several_batches_leaves_all_of_the_step_out():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimization = Optimization(optimizer, scaler=torch.amp.GradScaler("cpu"))
    optimization.backward(in_half(parameter))
    optimization.backward(parameter.sum())
    assert optimization.step() == "overflow"
    optimization.backward(parameter.sum())
    assert optimization.step() == "followed"
    assert parameter.detach() == pytest.approx(torch.tensor([0.9, -2.1]))


def test_the_scale_and_what_it_has_grown_come_back_from_the_state():
    def fresh():
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        scaler = torch.amp.GradScaler("cpu", growth_interval=3)
        return parameter, Optimization(torch.optim.SGD([parameter], lr=0.1), scaler=scaler)

    def scales(parameter, optimization, steps):
        seen = []
        for _ in range(steps):
            optimization.backward(in_half(parameter))
            followed = optimization.step()
            seen.append((followed == "followed", math.log2(optimization.scaler.get_scale())))
        return seen

    parameter, optimization = fresh()
    before = scales(parameter, optimization, 3)
    assert before == [(False, 15), (True, 15), (True, 15)]
    saved = copy.deepcopy(optimization.state_dict())
    again, resumed = fresh()
    again.data.copy_(parameter.data)
    resumed.load_state_dict(saved)
    expected = [(True, 16), (False, 15), (True, 15)]
    assert scales(parameter, optimization, 3) == expected
    assert scales(again, resumed, 3) == expected
    assert torch.equal(parameter, again)
