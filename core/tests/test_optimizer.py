import copy
import math

import pytest
import torch
from torch import nn

from distill import ConfigError, check
from distill.config.experiment import Clip, Component
from distill.testing import toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.non_finite import SMALLEST_SCALE
from distill.training.optimizer import Optimization, build_optimization, fused

CPU = torch.device("cpu")
PLATEAU = {"type": "ReduceLROnPlateau", "params": {"mode": "max", "factor": 0.1, "patience": 0}}
PLAIN = {"type": "SGD", "params": {"lr": 1.0}}


class Two(nn.Module):
    """Two numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))


def build(folder, module, **stage):
    experiment = toy_experiment(folder, stage)
    builder = Builder(experiment, toy_registry())
    return build_optimization(builder, experiment.stages[0], {"student": module}, CPU)


def built(folder, **stage):
    """A parameter and what changes it."""
    module = Two()
    return module.weight, build(folder, module, **stage)


def follow(optimization, loss):
    optimization.backward(loss)
    return optimization.step()


def test_a_step_is_the_optimizers_own(tmp_path):
    ours, optimization = built(tmp_path)
    theirs = Two().weight
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(3):
        assert follow(optimization, ours.square().sum()) == "followed"
        optimizer.zero_grad()
        theirs.square().sum().backward()
        optimizer.step()
    assert torch.equal(ours, theirs)
    assert optimization.lr == 0.1
    assert optimization.scaler is None
    assert [id(p) for p in optimization.parameters] == [id(ours)]


def test_gradients_of_the_step_before_do_not_count(tmp_path):
    ours, optimization = built(tmp_path, optimizer=PLAIN)
    for _ in range(2):
        follow(optimization, ours.sum())
    assert ours.tolist() == [-1.0, -4.0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_of_several_losses_add_up_to_one_step(tmp_path, precision):
    ours, optimization = built(tmp_path, optimizer=PLAIN, precision=precision)
    optimization.backward(ours.sum())
    optimization.backward((ours * torch.tensor([1.0, 2.0])).sum())
    assert optimization.step() == "followed"
    assert ours.tolist() == [-1.0, -5.0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("bound", "factor"), [(1.0, 1 / 5), (5.0, 1.0), (7.0, 1.0)])
def test_the_norm_of_a_gradient_can_be_bounded(tmp_path, precision, bound, factor):
    ours, optimization = built(tmp_path, optimizer=PLAIN, clip={"norm": bound}, precision=precision)
    gradient = torch.tensor([3.0, 4.0])
    before = ours.detach().clone()
    assert follow(optimization, (ours * gradient).sum())
    torch.testing.assert_close(before - ours, gradient * factor)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_each_element_of_a_gradient_can_be_bounded(tmp_path, precision):
    ours, optimization = built(tmp_path, optimizer=PLAIN, clip={"value": 1.5}, precision=precision)
    before = ours.detach().clone()
    assert follow(optimization, (ours * torch.tensor([1.0, -4.0])).sum())
    torch.testing.assert_close(before - ours, torch.tensor([1.0, -1.5]))


@pytest.mark.parametrize("clip", [None, {"norm": 1.0}, {"value": 1.0}, {"norm": 1, "value": 1}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_followed_and_stays_to_be_looked_at(
    tmp_path, clip, bad
):
    ours, optimization = built(tmp_path, clip=clip)
    before = ours.detach().clone()
    assert follow(optimization, (ours * torch.tensor([1.0, bad])).sum()) == "not finite"
    assert torch.equal(ours, before)
    assert not torch.isfinite(ours.grad).all()
    assert ours not in optimization.optimizer.state


def test_nothing_to_train_is_told_at_the_freezing(tmp_path):
    module = Two().requires_grad_(False)
    with pytest.raises(ConfigError, match="everything is frozen") as caught:
        build(tmp_path, module, freeze=["student"])
    assert caught.value.faults[0].path == "stages.stage0.freeze"


def test_a_scheduler_that_watches_needs_something_to_watch(tmp_path):
    with pytest.raises(
        ConfigError, match="ReduceLROnPlateau watches a validation metric"
    ) as caught:
        built(tmp_path, scheduler=PLATEAU, data={"train": "train", "batch_size": 8})
    (fault,) = caught.value.faults
    assert fault.path == "stages.stage0.scheduler"
    assert fault.location.line > 0


def test_a_scheduler_that_watches_accuracy_the_wrong_way_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="better when higher: mode: max"):
        built(tmp_path, scheduler={"type": "ReduceLROnPlateau"})


def test_a_scheduler_may_watch_another_metric_than_the_first(tmp_path):
    stage = {"metrics": ["accuracy", "cross_entropy"]}
    lower = {"type": "ReduceLROnPlateau", "watch": "cross_entropy"}
    assert built(tmp_path, scheduler=lower, **stage)
    with pytest.raises(ConfigError, match="'cross_entropy', which is better when lower: mode: min"):
        built(tmp_path, scheduler={**PLATEAU, "watch": "cross_entropy"}, **stage)


def test_without_one_to_name_a_scheduler_watches_what_decides(tmp_path):
    stage = {"metrics": ["accuracy", "cross_entropy"], "best_by": "cross_entropy"}
    assert built(tmp_path, scheduler={"type": "ReduceLROnPlateau"}, **stage)
    with pytest.raises(ConfigError, match="watches 'cross_entropy'"):
        built(tmp_path, scheduler=PLATEAU, **stage)


def test_check_finds_a_scheduler_that_watches_the_wrong_way(tmp_path):
    experiment = toy_experiment(tmp_path, {"scheduler": {"type": "ReduceLROnPlateau"}})
    with pytest.raises(ConfigError, match="better when higher"):
        check(experiment, toy_registry())


@pytest.mark.parametrize("clip", [None, {"norm": 100.0}, {"value": 100.0}])
def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(tmp_path, clip):
    ours, optimization = built(tmp_path, precision="fp16", clip=clip)
    before = ours.detach().clone()
    scale = optimization.scaler.get_scale()
    assert follow(optimization, (ours * float("inf")).sum()) == "overflow"
    assert torch.equal(ours, before)
    assert optimization.scaler.get_scale() == scale / 2
    assert follow(optimization, ours.square().sum()) == "followed"
    assert torch.allclose(ours, before - 0.1 * 2 * before)


def test_an_overflow_however_far_the_loss_is_scaled_down_is_none(tmp_path):
    ours, optimization = built(tmp_path, precision="fp16")
    skipped = 0
    while follow(optimization, (ours * float("inf")).sum()) == "overflow":
        skipped += 1
    assert optimization.scaler.get_scale() == SMALLEST_SCALE / 2
    assert skipped == 26  # from 2**16


def test_a_step_that_is_said_to_be_left_out_is_left_out(tmp_path):
    """The elements are finite, the square of their norm is not."""
    ours, optimization = built(tmp_path, precision="fp16", clip={"norm": 1.0}, optimizer=PLAIN)
    optimization.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = ours.detach().clone()
    assert follow(optimization, (ours * 1e30).sum()) == "not finite"
    assert torch.equal(ours, before)


def test_state_holds_optimizer_schedule_and_scaler_and_goes_on_from_them(tmp_path):
    scheduler = {"type": "StepLR", "params": {"step_size": 2}}

    def epoch(ours, optimization, number):
        follow(optimization, ours.square().sum())
        optimization.schedule.advance("epochs", number)

    ours, optimization = built(tmp_path, scheduler=scheduler, precision="fp16")
    follow(optimization, (ours * float("inf")).sum())
    epoch(ours, optimization, 1)
    saved, weights = copy.deepcopy(optimization.state_dict()), ours.detach().clone()
    again, resumed = built(tmp_path, scheduler=scheduler, precision="fp16")
    again.data.copy_(weights)
    resumed.load_state_dict(saved)
    assert resumed.scaler.get_scale() == optimization.scaler.get_scale()
    for number in range(2, 5):
        epoch(ours, optimization, number)
        epoch(again, resumed, number)
    assert resumed.lr == optimization.lr == pytest.approx(0.001)
    assert torch.equal(ours, again)


def test_state_of_groups_with_settings_of_their_own_goes_on(tmp_path):
    optimizer = {**PLAIN, "groups": [{"match": ["student.head"], "params": {"lr": 0.5}}]}
    row = [
        {"type": "ExponentialLR", "params": {"gamma": 0.5}, "until": 2},
        {"type": "OneCycleLR", "params": {"max_lr": 3.0, "total_steps": 9}},
    ]

    def fresh():
        model = nn.Module()
        model.body, model.head = Two(), Two()
        return model, build(tmp_path, model, optimizer=optimizer, scheduler=row)

    def epoch(model, optimization, number):
        follow(optimization, (model.body.weight.square() + model.head.weight.square()).sum())
        optimization.schedule.advance("epochs", number)
        return [dict(g, params=None) for g in optimization.optimizer.param_groups]

    model, optimization = fresh()
    for number in range(1, 4):
        epoch(model, optimization, number)
    again, resumed = fresh()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimization.state_dict()))
    for number in range(4, 7):
        assert epoch(model, optimization, number) == epoch(again, resumed, number)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_without_schedule_and_scaler_is_plain():
    optimizer = torch.optim.SGD([Two().weight], lr=0.1)
    state = Optimization(optimizer).state_dict()
    assert state["schedule"] is state["scaler"] is None
    Optimization(optimizer).load_state_dict(state)


def test_without_bounds_nothing_is_clipped():
    assert Optimization(torch.optim.SGD([Two().weight], lr=0.1)).clip == Clip(None, None)


def test_a_checkpoint_of_another_device_leaves_an_optimizer_fused_as_it_is():
    saved = Optimization(torch.optim.SGD([Two().weight], lr=0.1, momentum=0.9))
    follow(saved, saved.parameters[0].square().sum())
    weight = Two().weight
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    going_on = Optimization(optimizer, defers=True)
    going_on.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["fused"] is True
    assert follow(going_on, weight.square().sum()) == "deferred"


@pytest.mark.parametrize(
    ("params", "is_changed"),
    [({"lr": 0.1}, True), ({"lr": 0.1, "foreach": True}, False), ({"fused": False}, False)],
)
def test_an_optimizer_is_fused_where_the_file_says_nothing(tmp_path, params, is_changed):
    builder = Builder(toy_experiment(tmp_path, {}), toy_registry())
    component = Component("AdamW", params, ())
    assert (fused(builder, component).params.get("fused") is True) == is_changed


def test_an_optimizer_without_a_fused_form_stays(tmp_path):
    builder = Builder(toy_experiment(tmp_path, {}), toy_registry())
    component = Component("Rprop", {"lr": 0.1}, ())
    assert fused(builder, component) is component


@pytest.mark.parametrize(
    ("device", "type_", "precision", "defers", "leaves_out"),
    [
        ("cpu", "SGD", "fp32", False, False),
        ("cuda", "SGD", "fp32", True, True),
        ("cuda", "Rprop", "fp32", True, False),
        ("cuda", "SGD", "fp16", True, True),
        ("cuda", "Rprop", "fp16", False, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_on_a_gpu_nobody_waits_but_a_scaler_whose_optimizer_is_not_fused(
    tmp_path, device, type_, precision, defers, leaves_out
):
    optimizer = {"type": type_, "params": {"lr": 0.1}}
    described = toy_experiment(tmp_path, {"optimizer": optimizer, "precision": precision})
    builder = Builder(described, toy_registry())
    optimization = build_optimization(
        builder, described.stages[0], {"student": Two()}, torch.device(device)
    )
    assert (optimization.defers, optimization.leaves_out) == (defers, leaves_out)
