"""What the optimizer changes, in groups with settings of their own."""

import pytest
import torch
from torch import nn

from distill import ConfigError
from distill.testing import ToyConvNet, ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.optimizer import build_optimization
from distill.training.parameter_groups import parameter_groups

SGD = {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.01}}


def groups_of(folder, optimizer, **trained):
    """Each group as its settings and the names of its parameters."""
    experiment = toy_experiment(folder, {"optimizer": {**SGD, **optimizer}})
    builder = Builder(experiment, toy_registry())
    groups = parameter_groups(builder, experiment.stages[0], trained)
    names = {id(p): f"{o}.{n}" for o, m in trained.items() for n, p in m.named_parameters()}
    return [
        ({k: v for k, v in group.items() if k != "params"}, [names[id(p)] for p in group["params"]])
        for group in groups
    ]


def faults_of(folder, optimizer, **trained):
    with pytest.raises(ConfigError) as caught:
        groups_of(folder, optimizer, **trained)
    return [(fault.path, fault.message) for fault in caught.value.faults]


def test_without_groups_everything_that_trains_is_in_one(tmp_path):
    student, regressor = ToyMLP(), nn.Linear(2, 2)
    student.head.requires_grad_(False)
    ((settings, names),) = groups_of(tmp_path, {}, student=student, regressor=regressor)
    assert settings == {}
    body, own = ("student.body.0.weight", "student.body.0.bias"), ("weight", "bias")
    assert names == [*body, *(f"regressor.{name}" for name in own)]


def test_a_group_has_its_settings_and_the_main_one_comes_first_with_the_rest(tmp_path):
    groups = [{"match": ["student.head"], "params": {"lr": 1.0}}]
    main, head = groups_of(tmp_path, {"groups": groups}, student=ToyMLP())
    assert main == ({}, ["student.body.0.weight", "student.body.0.bias"])
    assert head == ({"lr": 1.0}, ["student.head.weight", "student.head.bias"])


def test_a_parameter_belongs_to_the_first_group_that_means_it(tmp_path):
    groups = [
        {"match": ["student.head.bias"], "params": {"lr": 1.0}},
        {"match": ["student.head", "student.*.bias"], "params": {"lr": 2.0}},
        {"match": ["student.body"]},
    ]
    assert groups_of(tmp_path, {"groups": groups}, student=ToyMLP()) == [
        ({"lr": 1.0}, ["student.head.bias"]),
        ({"lr": 2.0}, ["student.head.weight", "student.body.0.bias"]),
        ({}, ["student.body.0.weight"]),
    ]


def test_what_has_no_decay_is_parted_from_its_group(tmp_path):
    optimizer = {
        "groups": [{"match": ["student.conv"], "params": {"lr": 1.0}}],
        "no_decay": ["bias", "norm"],
    }
    assert groups_of(tmp_path, optimizer, student=ToyConvNet()) == [
        ({}, ["student.head.weight"]),
        ({"weight_decay": 0.0}, ["student.norm.weight", "student.norm.bias", "student.head.bias"]),
        ({"lr": 1.0}, ["student.conv.weight"]),
        ({"lr": 1.0, "weight_decay": 0.0}, ["student.conv.bias"]),
    ]


def test_a_shared_parameter_is_in_one_group_once(tmp_path):
    student = ToyMLP()
    twin = nn.Linear(1, 1)
    twin.weight = student.head.weight
    groups = groups_of(tmp_path, {"no_decay": ["bias"]}, student=student, twin=twin)
    assert sum(len(names) for _, names in groups) == 5


def test_what_is_frozen_is_in_no_group_though_one_means_it(tmp_path):
    student = ToyMLP()
    student.head.requires_grad_(False)
    groups = [{"match": ["student.head"], "params": {"lr": 1.0}}]
    ((_, names),) = groups_of(tmp_path, {"groups": groups}, student=student)
    assert names == ["student.body.0.weight", "student.body.0.bias"]


def test_groups_that_mean_nothing_are_faults_of_their_places_all_at_once(tmp_path):
    optimizer = {
        "groups": [{"match": ["student.head"]}, {"match": ["student.body", "student.haed"]}],
        "no_decay": ["biass", "norm"],
    }
    faults = dict(faults_of(tmp_path, optimizer, student=ToyMLP()))
    base = "stages.stage0.optimizer"
    assert set(faults) == {
        f"{base}.groups[1].match[1]",
        f"{base}.no_decay[0]",
        f"{base}.no_decay[1]",
    }
    assert "did you mean head" in faults[f"{base}.groups[1].match[1]"]
    assert "did you mean bias" in faults[f"{base}.no_decay[0]"]


def test_a_setting_that_the_optimizer_does_not_take_is_a_fault_of_the_group(tmp_path):
    groups = [{"match": ["student.head"], "params": {"lrr": 1.0}}]
    ((path, message),) = faults_of(tmp_path, {"groups": groups}, student=ToyMLP())
    assert path == "stages.stage0.optimizer.groups[0].params.lrr"
    assert "optimizer SGD: there is no parameter 'lrr'; did you mean lr?" in message


def test_no_decay_needs_an_optimizer_with_decay(tmp_path):
    optimizer = {"type": "Rprop", "params": {"lr": 0.1}, "no_decay": ["bias"]}
    ((path, message),) = faults_of(tmp_path, optimizer, student=ToyMLP())
    assert path == "stages.stage0.optimizer.no_decay"
    assert message == "Rprop has no weight decay"


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("student.head", ["student.head.weight", "student.head.bias"]),
        ("student.head.weight", ["student.head.weight"]),
        ("student.*.bias", ["student.conv.bias", "student.norm.bias", "student.head.bias"]),
        ("student.[ch]*.weight", ["student.conv.weight", "student.head.weight"]),
        ("Conv2d", ["student.conv.weight", "student.conv.bias"]),
        ("BatchNorm2d", ["student.norm.weight", "student.norm.bias"]),
        (
            "bias",
            [
                *("student.conv.bias", "student.norm.bias", "student.head.bias"),
                *("regressor.0.bias", "regressor.1.bias", "criterion.hint.bias"),
            ],
        ),
        (
            "norm",
            [
                *("student.norm.weight", "student.norm.bias"),
                *("regressor.1.weight", "regressor.1.bias"),
            ],
        ),
        ("regressor.0", ["regressor.0.weight", "regressor.0.bias"]),
        ("criterion.hint", ["criterion.hint.weight", "criterion.hint.bias"]),
        ("Linear", ["student.head", "regressor.0", "criterion.hint"]),
    ],
)
def test_an_entry_may_be_a_module_a_pattern_a_class_or_a_word(tmp_path, entry, meant):
    trained = {
        "student": ToyConvNet(),
        "regressor": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        "criterion.hint": nn.Linear(2, 2),
    }
    groups = [{"match": [entry], "params": {"lr": 1.0}}]
    main, (settings, names) = groups_of(tmp_path, {"groups": groups}, **trained)
    if entry == "Linear":
        meant = [f"{module}.{name}" for module in meant for name in ("weight", "bias")]
    assert settings == {"lr": 1.0}
    assert sorted(names) == sorted(meant)
    everything = [f"{o}.{n}" for o, m in trained.items() for n, _ in m.named_parameters()]
    assert main == ({}, [name for name in everything if name not in names])


def test_faults_have_the_line_of_their_entry(tmp_path, place):
    groups = [
        {"match": ["student.head"], "params": {"lr": 1.0, "momentun": 0.5}},
        {"match": ["student.haed"]},
    ]
    with pytest.raises(ConfigError) as caught:
        groups_of(tmp_path, {"groups": groups, "no_decay": ["nrom"]}, student=ToyMLP())
    text = (tmp_path / "toy.yaml").read_text()
    lines = {fault.location.line for fault in caught.value.faults}
    pieces = ("momentun", "- student.haed", "- nrom")
    assert lines == {int(place(text, piece).split(":")[0]) for piece in pieces}


def test_a_pattern_that_fits_nothing_is_told_with_names_that_there_are(tmp_path):
    groups = [{"match": ["student.*.gamma"]}]
    ((path, message),) = faults_of(tmp_path, {"groups": groups}, student=ToyMLP())
    assert path == "stages.stage0.optimizer.groups[0].match[0]"
    assert message.startswith("no parameter's name fits 'student.*.gamma'")
    assert "student.body.0.weight" in message


def stepped(folder, optimizer, gradient):
    """Each parameter of a toy before and after a step whose gradient is ``gradient`` everywhere."""
    experiment = toy_experiment(folder, {"optimizer": optimizer})
    builder = Builder(experiment, toy_registry())
    torch.manual_seed(0)
    student = ToyConvNet()
    with torch.no_grad():
        student.norm.bias.fill_(0.5)  # or its decay could not be seen
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    device = torch.device("cpu")
    optimization = build_optimization(builder, experiment.stages[0], {"student": student}, device)
    optimization.backward(sum(gradient * p.sum() for p in student.parameters()))
    assert optimization.step()
    after = dict(student.named_parameters())
    return {name: (value, after[name].detach()) for name, value in before.items()}


def test_after_a_step_without_gradient_what_has_no_decay_is_as_before_to_the_bit(tmp_path):
    optimizer = {
        "type": "SGD",
        "params": {"lr": 0.5, "weight_decay": 0.1},
        "no_decay": ["bias", "norm"],
        "groups": [{"match": ["student.head"], "params": {"lr": 0.25, "weight_decay": 0.2}}],
    }
    factors = {"conv.weight": 1 - 0.5 * 0.1, "head.weight": 1 - 0.25 * 0.2}
    found = stepped(tmp_path, optimizer, 0.0)
    assert len(found) == 6
    for name, (before, after) in found.items():
        if name in factors:
            torch.testing.assert_close(after, before * factors[name])
            assert not torch.equal(after, before)
        else:
            assert torch.equal(after, before), name


def test_a_step_moves_each_group_by_its_own_rate(tmp_path):
    optimizer = {
        "type": "SGD",
        "params": {"lr": 0.5},
        "groups": [
            {"match": ["student.conv.bias"], "params": {"lr": 0.0}},
            {"match": ["student.conv", "student.norm"], "params": {"lr": 0.125}},
        ],
    }
    rates = {"conv.bias": 0.0, "conv.weight": 0.125, "norm.weight": 0.125, "norm.bias": 0.125}
    for name, (before, after) in stepped(tmp_path, optimizer, 2.0).items():
        torch.testing.assert_close(after, before - rates.get(name, 0.5) * 2.0, msg=name)
