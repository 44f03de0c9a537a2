"""Gradients of some terms apart from the others'; this file is also what several processes run."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._functorch import config as functorch

import distill
from distill import ConfigError, NumericalError
from distill.config.experiment import Clip
from distill.model.criterion import Criterion
from distill.model.wiring import Call
from distill.testing import ToyConvNet, run_processes, toy_experiment, toy_registry
from distill.training.form import compiled
from distill.training.optimizer import Optimization
from distill.training.split_gradients import Split


class Apart(torch.optim.Optimizer):
    """SGD with a learning rate and a momentum of its own for what it takes apart."""

    takes_apart = "terms"

    def __init__(self, params, terms, lr=0.1, faster=1.0, momentum=0.0, weight_decay=0.0):
        self.terms = terms
        self.gradients_apart = {}
        defaults = {"lr": lr, "faster": faster, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                rest, apart = p.grad, self.gradients_apart.get(p)
                decay, lr = group["weight_decay"], group["lr"]
                self.follow(p, rest, "rest", group, lr, decay)
                alone = decay if rest is None else 0.0
                self.follow(p, apart, "apart", group, lr * group["faster"], alone)

    def follow(self, p, gradient, name, group, lr, decay):
        if gradient is not None:
            state = self.state[p]
            kept = state.get(name, torch.zeros_like(p))
            state[name] = group["momentum"] * kept + gradient + decay * p
            p -= lr * state[name]


def parts(clip=None, scaler=None, apart=("kd",), **weights):
    """Three parameters: both kinds of term reach the first, and one each of the others."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 2, 2)]
    names = {"ce": 1.0, "kd": 1.0, **weights}
    criterion = Criterion([Call(name, nn.Identity(), {}) for name in names], names)
    optimizer = Apart(parameters, list(apart), lr=1.0)
    optimization = Optimization(optimizer, scaler=scaler, clip=clip or Clip())
    optimization.split = Split(optimizer, criterion, apart, parameters)
    return parameters, optimization


def losses_of(parameters, factor=1.0):
    both, of_ce, of_kd = parameters
    return {
        "ce": factor * ((both * both).sum() + of_ce.sum()),
        "kd": factor * ((3 * both).sum() + (of_kd * of_kd).sum()),
    }


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_optimizer_is_given_each_kind_of_gradient_of_the_weighted_terms():
    parameters, optimization = parts(ce=0.5, kd=2.0)
    both, of_ce, of_kd = (p.detach().clone() for p in parameters)
    for factor, share in ((1.0, 1.0), (0.5, 0.25)):  # two batches of a step
        optimization.backward_of(losses_of(parameters, factor), share)
    apart = optimization.optimizer.gradients_apart
    assert apart == {}
    assert optimization.step() == "followed"
    apart = optimization.optimizer.gradients_apart
    close(parameters[0].grad, 1.125 * 0.5 * 2 * both)
    close(parameters[1].grad, 1.125 * 0.5 * torch.ones_like(of_ce))
    assert parameters[2].grad is None
    close(apart[parameters[0]], 1.125 * 2.0 * 3 * torch.ones_like(both))
    close(apart[parameters[2]], 1.125 * 2.0 * 2 * of_kd)
    assert parameters[1] not in apart


def test_gradients_of_the_step_before_do_not_count():
    parameters, optimization = parts()
    for _ in range(2):
        before = [p.detach().clone() for p in parameters]
        optimization.backward_of(losses_of(parameters), 1.0)
        assert optimization.step() == "followed"
    close(parameters[0].detach(), before[0] - 2 * before[0] - 3)
    close(parameters[2].detach(), before[2] - 2 * before[2])


def test_weights_that_change_hold_from_then_on():
    parameters, optimization = parts()
    optimization.split._criterion.weights["kd"] = 0.5
    optimization.backward_of(losses_of(parameters), 1.0)
    optimization.step()
    close(optimization.optimizer.gradients_apart[parameters[0]], 1.5 * torch.ones(3).double())


@pytest.mark.parametrize("bound", [0.7, 1e6])
def test_the_norm_of_the_sum_is_bounded_and_both_are_scaled_alike(bound):
    free, plain = parts()
    plain.backward_of(losses_of(free), 1.0)
    plain.step()
    parameters, optimization = parts(Clip(norm=bound))
    optimization.backward_of(losses_of(parameters), 1.0)
    optimization.step()
    apart, whole = optimization.optimizer.gradients_apart, plain.optimizer.gradients_apart
    sums = [free[0].grad + whole[free[0]], free[1].grad, whole[free[2]]]
    factor = min(1.0, bound / torch.cat(sums).norm().item())
    near = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(parameters[0].grad, factor * free[0].grad, **near)
    torch.testing.assert_close(apart[parameters[0]], factor * whole[free[0]], **near)
    torch.testing.assert_close(apart[parameters[2]], factor * whole[free[2]], **near)


def test_a_bound_of_elements_is_one_of_either_kind():
    parameters, optimization = parts(Clip(value=0.25))
    optimization.backward_of(losses_of(parameters), 1.0)
    optimization.step()
    assert parameters[0].grad.abs().max() <= 0.25
    assert torch.equal(
        optimization.optimizer.gradients_apart[parameters[0]], torch.full((3,), 0.25).double()
    )


def in_half(value):
    """The sum through fp16, where a gradient overflows above a scale of 65504."""
    return value.half().float().sum()


def half_losses(parameters, apart=True):
    both = parameters[0]
    smooth = both.float().sum() * 0.5
    rough = in_half(both)
    ce, kd = (smooth, rough) if apart else (rough, smooth)
    return {"ce": ce + 0.0 * parameters[1].float().sum(), "kd": kd}


def test_gradients_are_free_of_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameters, optimization = parts(scaler=scaler)
    optimization.backward_of(half_losses(parameters), 1.0)
    assert optimization.step() == "followed"
    close(parameters[0].grad, torch.full((3,), 0.5).double())
    close(optimization.optimizer.gradients_apart[parameters[0]], torch.ones(3).double())


@pytest.mark.parametrize("apart", [True, False])
def test_an_overflow_in_either_kind_leaves_the_step_out_and_lowers_the_scale(apart):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    parameters, optimization = parts(scaler=scaler)
    before = copy.deepcopy([p.detach() for p in parameters])
    optimization.backward_of(half_losses(parameters, apart), 1.0)
    assert optimization.step() == "overflow"
    assert scaler.get_scale() == 2.0**16
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    optimization.backward_of(half_losses(parameters, apart), 1.0)
    assert optimization.step() == "overflow"
    optimization.backward_of(half_losses(parameters, apart), 1.0)
    assert optimization.step() == "followed"


def test_without_a_scale_what_is_not_finite_is_not_followed():
    parameters, optimization = parts(kd=math.inf)
    before = parameters[0].detach().clone()
    optimization.backward_of(losses_of(parameters), 1.0)
    assert optimization.step() == "not finite"
    assert torch.equal(parameters[0], before)


LINEAR = {
    "type": "Linear",
    "params": {"in_features": 8, "out_features": 12},
    "inputs": {"input": "student.body"},
}
TERMS = {
    "ce": {"type": "CrossEntropyLoss"},
    "kd": {
        "type": "MSELoss",
        "weight": 0.3,
        "inputs": {"input": "student", "target": "teacher"},
    },
    "hint": {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.body"}},
}
STAGE = {
    "epochs": 2,
    "data": {"train": "train", "batch_size": 4, "accumulate": 2},
    "teacher": {"model": "wide"},
    "auxiliary": {"regressor": LINEAR},
    "criterion": TERMS,
    "clip": {"norm": 0.5},
}
SETTINGS = {
    "groups": [{"match": ["student.head"], "params": {"lr": 0.05}}],
    "no_decay": ["bias"],
}
SGD = {
    "type": "SGD",
    "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    **SETTINGS,
}
APART = {
    "type": "Apart",
    "params": {**SGD["params"], "terms": ["kd", "hint"]},
    **SETTINGS,
}
REGISTRY = toy_registry(optimizers={"Apart": Apart})


class Exploding(nn.Module):
    """Finite, with a gradient that is not."""

    def forward(self, student):
        return (0 * student.sum()).sqrt()


def weights_of(folder):
    return load_file(folder / "toy/stage0/last.safetensors")


def trained(folder, optimizer, registry=REGISTRY, **more):
    experiment = toy_experiment(folder, {**STAGE, "optimizer": optimizer, **more})
    distill.run(experiment, registry=registry, runs=folder)
    return weights_of(folder)


@pytest.mark.parametrize("more", [{}, {"precision": "fp16"}, {"clip": {"norm": 1e9}}])
def test_followed_alike_both_kinds_train_what_their_sum_does(tmp_path, more):
    whole = trained(tmp_path / "whole", SGD, **more)
    apart = trained(tmp_path / "apart", APART, **more)
    rounding = 2e-3 if "precision" in more else 1e-6
    torch.testing.assert_close(apart, whole, rtol=0, atol=rounding)


def test_followed_otherwise_they_do_not(tmp_path):
    faster = {**APART, "params": {**APART["params"], "faster": 2.0}}
    ours, theirs = trained(tmp_path / "a", APART), trained(tmp_path / "b", faster)
    assert (ours["head.weight"] - theirs["head.weight"]).abs().max() > 1e-4


def test_the_parameter_whose_gradient_is_not_finite_is_named(tmp_path):
    registry = toy_registry(optimizers={"Apart": Apart}, losses={"Exploding": Exploding})
    criterion = {**TERMS, "kd": {"type": "Exploding"}}
    told = "step 1: every term is finite, the gradient of student.body.0.weight"
    with pytest.raises(NumericalError, match=told):
        trained(tmp_path, APART, registry, criterion=criterion)


def test_what_a_compiled_model_leaves_for_its_backward_is_kept_for_a_second_one():
    before = functorch.donated_buffer
    with compiled([], keeps_graph=True):
        assert not functorch.donated_buffer
    assert functorch.donated_buffer is before
    with compiled([]):
        assert functorch.donated_buffer is before


def faults(folder, *stages):
    with pytest.raises(ConfigError) as error:
        distill.check(toy_experiment(folder, *stages), registry=REGISTRY)
    return [str(fault) for fault in error.value.faults]


def with_terms(*terms, **more):
    params = {**APART["params"], "terms": list(terms)}
    return {**STAGE, "optimizer": {**APART, "params": params, **more}}


def place_of(folder, piece):
    lines = (folder / "toy.yaml").read_text("utf-8").splitlines()
    found = [n for n, line in enumerate(lines, 1) if line.strip() == piece]
    assert len(found) == 1
    return f"{folder / 'toy.yaml'}:{found[0]}"


def test_an_unknown_term_is_one_fault_at_its_place(tmp_path):
    (told,) = faults(tmp_path, with_terms("kd", "hnt"))
    assert told.startswith(place_of(tmp_path, "- hnt"))
    assert "stage0.optimizer.params.terms[1]" in told
    assert told.endswith("stage 'stage0' has no term 'hnt'; did you mean hint?")
    (told,) = faults(tmp_path, with_terms("kd", "distil"))
    assert told.endswith("stage 'stage0' has no term 'distil' (there are: ce, kd, hint)")


def test_an_inherited_optimizer_must_fit_the_later_stage_s_terms(tmp_path):
    later = {"criterion": {"ce": TERMS["ce"], "hint": TERMS["hint"]}}
    (told,) = faults(tmp_path, with_terms("kd"), later)
    assert told.startswith(place_of(tmp_path, "- kd"))
    assert told.endswith("stage 'stage1' has no term 'kd' (there are: ce, hint)")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (with_terms(), "name the terms that Apart takes apart (there are: ce, kd, hint)"),
        (with_terms("kd", "ce", "hint"), "stage 'stage0' has no other terms than these for Apart"),
        (
            {**with_terms("kd"), "parallel": "fsdp"},
            "Apart takes gradients apart, which fsdp cannot",
        ),
        (
            with_terms("kd", groups=[{"match": ["student.head"], "params": {"terms": ["ce"]}}]),
            "'terms' holds for all groups; give it in the optimizer's params",
        ),
    ],
)
def test_what_cannot_be_is_one_fault(tmp_path, stage, message):
    (told,) = faults(tmp_path, stage)
    assert message in told


def test_a_run_refuses_it_too(tmp_path):
    with pytest.raises(ConfigError, match="has no term 'hnt'; did you mean hint"):
        distill.run(toy_experiment(tmp_path, with_terms("hnt")), registry=REGISTRY, runs=tmp_path)


def test_a_term_that_a_fault_hides_is_not_told_again(tmp_path):
    hidden = {**with_terms("kd"), "criterion": {**TERMS, "kd": {"tpye": "MSELoss"}}}
    with pytest.raises(ConfigError) as error:
        toy_experiment(tmp_path, hidden)
    assert len(error.value.faults) == 1


class Double(ToyConvNet):
    """In float64."""

    def __init__(self, width=4):
        super().__init__(width)
        self.double()

    def forward(self, inputs):
        return super().forward(inputs.double())


CONV = {
    "type": "DoubleConv",
    "params": {"in_channels": 4, "out_channels": 6, "kernel_size": 1},
    "inputs": {"input": "student.conv"},
}


def spread_run(folder):
    """Batches of 3 and steps of 2, of 10 samples: at times one of two processes has nothing."""
    hint = {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.conv"}}
    experiment = toy_experiment(
        folder,
        {
            **STAGE,
            "data": {"train": "train", "batch_size": 3, "accumulate": 2},
            "student": {"model": "thin"},
            "auxiliary": {"regressor": CONV},
            "criterion": {**TERMS, "hint": hint},
            "optimizer": {**APART, "params": {**APART["params"], "faster": 1.5}},
        },
        datasets={"train": {"type": "ToyData", "params": {"size": 10, "shape": [1, 4, 4]}}},
        models={"thin": {"type": "Double"}, "wide": {"type": "Double", "params": {"width": 6}}},
    )
    registry = toy_registry(
        optimizers={"Apart": Apart},
        models={"Double": Double},
        auxiliary_modules={"DoubleConv": lambda **given: nn.Conv2d(**given).double()},
    )
    distill.run(experiment, registry=registry, runs=folder)


def test_two_processes_train_what_one_does_to_rounding(tmp_path):
    spread_run(tmp_path / "one")
    run_processes(__file__, str(tmp_path / "two"))
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert one["conv.weight"].dtype == torch.float64
    torch.testing.assert_close(two, one, rtol=0, atol=1e-13)


if __name__ == "__main__":
    torch.set_num_threads(1)
    spread_run(Path(sys.argv[1]))
