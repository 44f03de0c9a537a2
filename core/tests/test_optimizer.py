import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from distill import ConfigError, check
from distill.testing import toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.optimizer import Optimization, build_optimization

CPU = torch.device("cpu")
PLATEAU = {"type": "ReduceLROnPlateau", "params": {"mode": "max", "factor": 0.1, "patience": 0}}


def parameter():
    return nn.Parameter(torch.tensor([1.0, -2.0]))


def build(folder, parameters, **stage):
    experiment = toy_experiment(folder, stage)
    builder = Builder(experiment, toy_registry())
    return build_optimization(builder, experiment.stages[0], parameters, CPU)


def test_a_step_is_the_optimizers_own(tmp_path):
    ours, theirs = parameter(), parameter()
    optimization = build(tmp_path, [ours])
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(3):
        optimization.step(ours.square().sum())
        optimizer.zero_grad()
        theirs.square().sum().backward()
        optimizer.step()
    assert torch.equal(ours, theirs)
    assert optimization.lr == 0.1
    assert optimization.scaler is None


def test_gradients_of_the_step_before_do_not_count(tmp_path):
    ours = parameter()
    optimization = build(tmp_path, [ours], optimizer={"type": "SGD", "params": {"lr": 1.0}})
    for _ in range(2):
        optimization.step(ours.sum())
    assert ours.tolist() == [-1.0, -4.0]


def test_a_scheduler_steps_once_an_epoch(tmp_path):
    scheduler = {"type": "MultiStepLR", "params": {"milestones": [1, 3], "gamma": 0.1}}
    optimization = build(tmp_path, [parameter()], scheduler=scheduler)
    rates = []
    for _ in range(4):
        rates.append(optimization.lr)
        optimization.step(optimization.optimizer.param_groups[0]["params"][0].sum())
        optimization.end_epoch(None)
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_a_scheduler_that_watches_is_given_the_validation_metric(tmp_path):
    optimization = build(tmp_path, [parameter()], scheduler=PLATEAU)
    rates = []
    for accuracy in (0.5, 0.6, 0.6, 0.7):
        optimization.end_epoch(accuracy)
        rates.append(optimization.lr)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_a_scheduler_that_watches_needs_something_to_watch(tmp_path):
    with pytest.raises(
        ConfigError, match="ReduceLROnPlateau watches a validation metric"
    ) as caught:
        build(tmp_path, [parameter()], scheduler=PLATEAU, data={"train": "train", "batch_size": 8})
    (fault,) = caught.value.faults
    assert fault.path == "stages.stage0.scheduler"
    assert fault.location.line > 0


def test_a_scheduler_that_watches_accuracy_the_wrong_way_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="better when higher: mode: max"):
        build(tmp_path, [parameter()], scheduler={"type": "ReduceLROnPlateau"})


def test_check_finds_a_scheduler_that_watches_the_wrong_way(tmp_path):
    experiment = toy_experiment(tmp_path, {"scheduler": {"type": "ReduceLROnPlateau"}})
    with pytest.raises(ConfigError, match="better when higher"):
        check(experiment, toy_registry())


def test_nothing_to_train_is_told_at_the_freezing(tmp_path):
    with pytest.raises(ConfigError, match="everything is frozen") as caught:
        build(tmp_path, [], freeze=["student"])
    assert caught.value.faults[0].path == "stages.stage0.freeze"


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(tmp_path):
    ours = parameter()
    optimization = build(tmp_path, [ours], precision="fp16")
    before = ours.detach().clone()
    scale = optimization.scaler.get_scale()
    optimization.step((ours * float("inf")).sum())
    assert torch.equal(ours, before)
    assert optimization.scaler.get_scale() == scale / 2
    optimization.step(ours.square().sum())
    assert torch.allclose(ours, before - 0.1 * 2 * before)


def test_state_holds_optimizer_scheduler_and_scaler_and_goes_on_from_them(tmp_path):
    def fresh():
        ours = parameter()
        scheduler = {"type": "StepLR", "params": {"step_size": 2}}
        return ours, build(tmp_path, [ours], scheduler=scheduler, precision="fp16")

    def epoch(ours, optimization):
        optimization.step(ours.square().sum())
        optimization.end_epoch(None)

    ours, optimization = fresh()
    optimization.step((ours * float("inf")).sum())
    epoch(ours, optimization)
    saved, weights = copy.deepcopy(optimization.state_dict()), ours.detach().clone()
    again, resumed = fresh()
    again.data.copy_(weights)
    resumed.load_state_dict(saved)
    assert resumed.scaler.get_scale() == optimization.scaler.get_scale()
    for _ in range(3):
        epoch(ours, optimization)
        epoch(again, resumed)
    assert resumed.lr == optimization.lr == pytest.approx(0.001)
    assert torch.equal(ours, again)


def test_state_without_scheduler_and_scaler_is_plain():
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    state = Optimization(optimizer, None, None).state_dict()
    assert state["scheduler"] is state["scaler"] is None
    Optimization(optimizer, None, None).load_state_dict(state)


@pytest.mark.parametrize("cls", [lr_scheduler.StepLR, lr_scheduler.CosineAnnealingLR])
def test_other_schedulers_are_not_given_a_metric(cls):
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    optimization = Optimization(optimizer, cls(optimizer, 1), None)
    optimization.optimizer.step()
    optimization.end_epoch(0.9)
    assert optimization.scheduler.last_epoch == 1
