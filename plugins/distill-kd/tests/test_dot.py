"""DOT against its formula, against SGD, and in an experiment."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import distill
import distill_kd.dot
from distill import ConfigError, EpochEnd, Observer
from distill.testing import toy_experiment, toy_registry
from distill_kd import KDLoss
from distill_kd.dot import DOT


def parameters_of(dtype=torch.float64):
    """One that both kinds of term depend on, one of the task's and one of the distillation's."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, dtype=dtype, generator=generator)) for n in (3, 2, 4)]


def gradients_of(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in (*parameters, *parameters)
    ]


def follow(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        both, task, _, both_kd, _, alone = gradients_of(parameters, step)
        parameters[0].grad, parameters[1].grad, parameters[2].grad = both, task, None
        optimizer.gradients_apart = {parameters[0]: both_kd, parameters[2]: alone}
        optimizer.step()


def by_hand(parameters, steps, lr, momentum, delta, decay):
    """Follow element by element, in plain numbers."""
    values = [p.tolist() for p in parameters]
    velocity = [[[0.0, 0.0] for _ in row] for row in values]
    for step in range(steps):
        gradients = [g.tolist() for g in gradients_of(parameters, step)]
        for n, row in enumerate(values):
            for i, value in enumerate(row):
                task = gradients[n][i] + decay * value
                kd = gradients[3 + n][i] + (decay * value if n == 2 else 0.0)
                v = velocity[n][i]
                if n == 0:
                    v[0] = (momentum - delta) * v[0] + task
                    v[1] = (momentum + delta) * v[1] + kd
                elif n == 1:
                    v[0] = momentum * v[0] + task
                else:
                    v[1] = momentum * v[1] + kd
                row[i] = value - lr * (v[0] + v[1])
    return [torch.tensor(row, dtype=torch.float64) for row in values]


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("momentum", "delta"), [(0.9, 0.075), (0.5, 0.5), (0.0, 0.0), (0.6, -0.3)])
def test_equals_the_formula_written_out(momentum, delta, decay):
    parameters = parameters_of()
    expected = by_hand(parameters, 5, 0.1, momentum, delta, decay)
    optimizer = DOT(parameters, ["kd"], 0.1, momentum, delta, decay)
    follow(optimizer, parameters, 5)
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_without_delta_it_is_sgd_on_the_sum():
    ours, theirs = parameters_of(), parameters_of()
    follow(DOT(ours, ["kd"], 0.1, 0.9, 0.0, 0.01), ours, 6)
    sgd = torch.optim.SGD(theirs, 0.1, 0.9, weight_decay=0.01)
    for step in range(6):
        both, task, _, both_kd, _, alone = gradients_of(theirs, step)
        for parameter, gradient in zip(theirs, (both + both_kd, task, alone), strict=True):
            parameter.grad = gradient
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_constant_distillation_gradient_is_followed_further_than_the_task_s():
    """1 / (1 - mu - delta) against 1 / (1 - mu + delta): what DOT is for."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DOT([weight], ["kd"], lr=1.0, momentum=0.8, delta=0.1)
    before = weight.detach().clone()
    for _ in range(400):
        before = weight.detach().clone()
        weight.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
        optimizer.gradients_apart = {weight: torch.tensor([0.0, 1.0], dtype=torch.float64)}
        optimizer.step()
    moved = (before - weight.detach()).tolist()
    assert moved == pytest.approx([1 / 0.3, 1 / 0.1])


def test_groups_have_settings_of_their_own():
    ours, apart = parameters_of(), parameters_of()
    groups = [
        {"params": ours[:1]},
        {"params": ours[1:], "lr": 0.2, "delta": 0.0, "weight_decay": 0.0},
    ]
    follow(DOT(groups, ["kd"], 0.1, 0.9, 0.05, 0.1), ours, 3)
    first = DOT(apart[:1], ["kd"], 0.1, 0.9, 0.05, 0.1)
    second = DOT(apart[1:], ["kd"], 0.2, 0.9, 0.0, 0.0)
    for step in range(3):
        for optimizer in (first, second):
            follow_one(optimizer, apart, step)
    assert all(torch.equal(a, b) for a, b in zip(ours, apart, strict=True))


def follow_one(optimizer, parameters, step):
    both, task, _, both_kd, _, alone = gradients_of(parameters, step)
    parameters[0].grad, parameters[1].grad, parameters[2].grad = both, task, None
    optimizer.gradients_apart = {parameters[0]: both_kd, parameters[2]: alone}
    optimizer.step()


def test_a_parameter_without_a_gradient_stays_as_it_is():
    parameters = parameters_of()
    before = parameters[1].detach().clone()
    optimizer = DOT(parameters, ["kd"], 0.1, weight_decay=0.1)
    parameters[0].grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state


def test_its_state_goes_on_to_the_same_bits():
    whole, parted = parameters_of(torch.float32), parameters_of(torch.float32)
    follow(DOT(whole, ["kd"], 0.1), whole, 6)
    first = DOT(parted, ["kd"], 0.1)
    follow(first, parted, 3)
    second = DOT(parted, ["kd"], 0.5)
    second.load_state_dict(first.state_dict())
    follow(second, parted, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"distillation_terms": []},
            r"distillation_terms must be a list of terms' names, got \[\]",
        ),
        (
            {"distillation_terms": "kd"},
            "distillation_terms must be a list of terms' names, got 'kd'",
        ),
        ({"lr": -0.1}, r"lr must be a finite number >= 0, got -0\.1"),
        ({"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number >= 0, got inf"),
        ({"momentum": 1.5}, r"momentum must be from 0 to 1, got 1\.5"),
        ({"delta": 0.2}, r"delta must be from -0\.1 to 0\.1, so that .*, got 0\.2"),
        ({"momentum": 0.05}, r"delta must be from -0\.05 to 0\.05, so that .*, got 0\.075"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    given = {"distillation_terms": ["kd"], **params}
    with pytest.raises(ValueError, match=f"DOT: {message}"):
        DOT(parameters_of(), **given)


def test_a_group_and_a_scheduler_cannot_leave_the_range_either():
    parameters = parameters_of()
    with pytest.raises(ValueError, match="DOT: delta must be from"):
        DOT([{"params": parameters, "delta": 0.3}], ["kd"])
    optimizer = DOT(parameters, ["kd"], momentum=0.9, delta=0.1)
    optimizer.param_groups[0]["momentum"] = 0.95
    with pytest.raises(ValueError, match=r"DOT: delta must be from -0\.05 to 0\.05"):
        optimizer.step()


class Stop(Observer):
    """Ends a run behind its first epoch, once."""

    waits = False

    def epoch_end(self, event: EpochEnd) -> None:
        if Stop.waits:
            Stop.waits = False
            raise KeyboardInterrupt


REGISTRY = toy_registry(
    optimizers={"DOT": DOT}, losses={"KDLoss": KDLoss}, observers={"Stop": Stop}
)
TERMS = {
    "ce": {"type": "CrossEntropyLoss", "weight": 0.1},
    "kd": {"type": "KDLoss", "params": {"alpha": 0.0, "beta": 1.0}, "weight": 0.9},
}
IN_ONE = {"kd": {"type": "KDLoss", "params": {"alpha": 0.1}}}


def optimizer_of(kind="DOT", **more):
    params = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **more}
    return {"type": kind, "params": params, "no_decay": ["bias"]}


def trained(folder, criterion, optimizer, **more):
    stage = {
        "epochs": 3,
        "data": {"train": "train", "batch_size": 4, "accumulate": 2},
        "teacher": {"model": "wide"},
        "criterion": criterion,
        "optimizer": optimizer,
        "scheduler": {"type": "StepLR", "params": {"step_size": 1}},
        **more,
    }
    experiment = toy_experiment(folder, stage, observers=["Stop"])
    distill.run(experiment, registry=REGISTRY, runs=folder)
    return load_file(folder / "toy/stage0/last.safetensors")


def test_in_an_experiment_it_is_sgd_without_delta_and_something_else_with_it(tmp_path):
    apart = {"distillation_terms": ["kd"]}
    sgd = trained(tmp_path / "sgd", IN_ONE, optimizer_of("SGD"))
    still = trained(tmp_path / "still", TERMS, optimizer_of(**apart, delta=0.0))
    dot = trained(tmp_path / "dot", TERMS, optimizer_of(**apart, delta=0.075))
    torch.testing.assert_close(still, sgd, rtol=0, atol=1e-6)
    assert (dot["head.weight"] - sgd["head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, precision):
    dot = optimizer_of(distillation_terms=["kd"])
    whole = trained(tmp_path / "whole", TERMS, dot, precision=precision)
    Stop.waits = True
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parted", TERMS, dot, precision=precision)
    parted = trained(tmp_path / "parted", TERMS, dot, precision=precision)
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


def test_terms_in_one_are_refused_with_what_to_do(tmp_path):
    dot = optimizer_of(distillation_terms=["kd"])
    with pytest.raises(
        ConfigError, match=r"no other terms than these for DOT .*; give the labels a"
    ):
        trained(tmp_path, IN_ONE, dot)


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.dot)
    assert results.attempted > 0
    assert results.failed == 0
