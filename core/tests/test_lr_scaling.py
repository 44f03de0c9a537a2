"""The linear scaling rule: k times the samples a step, k times the learning rate."""

import pytest
import yaml
from click.testing import CliRunner

import distill
from distill import ConfigError
from distill.cli import main
from distill.config.load import load
from distill.config.lr_scaling import scale_learning_rates
from distill.config.yaml_document import read
from distill.run_directory import resolved_text
from distill.testing import toy_experiment, toy_registry

ADAM = {"type": "Adam", "params": {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1}}


def data(batch_size, accumulate=1):
    return {
        "train": "train",
        "validate": "val",
        "batch_size": batch_size,
        "accumulate": accumulate,
    }


def scaled(folder, *stages, base=8):
    experiment, lines = scale_learning_rates(toy_experiment(folder, *stages), base)
    return experiment, lines


def resolved_optimizer(experiment, number=0):
    return experiment.resolved["stages"][number]["optimizer"]


def again(experiment, folder):
    """The experiment that its resolved text describes."""
    file = folder / "resolved.yaml"
    file.write_text(resolved_text(experiment))
    return load(file)


def test_the_optimizers_rate_and_those_of_groups_are_scaled_and_nothing_else(tmp_path):
    groups = [
        {"match": ["student.head"], "params": {"lr": 0.5, "weight_decay": 0.2}},
        {"match": ["student.body"], "params": {"weight_decay": 0.3}},
        {"match": ["bias"]},
    ]
    optimizer = {**ADAM, "groups": groups}
    experiment, _ = scaled(tmp_path, {"optimizer": optimizer, "data": data(16)}, base=8)
    of_stage = experiment.stages[0].optimizer
    assert of_stage.component.params == {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.1}
    assert [group.params for group in of_stage.groups] == [
        {"lr": 1.0, "weight_decay": 0.2},
        {"weight_decay": 0.3},
        {},
    ]
    assert [group.match for group in of_stage.groups] == [
        ("student.head",),
        ("student.body",),
        ("bias",),
    ]


def test_batches_that_make_up_a_step_count(tmp_path):
    experiment, (line,) = scaled(tmp_path, {"data": data(8, accumulate=3)}, base=16)
    assert experiment.stages[0].optimizer.component.params["lr"] == 0.15
    assert line == "stage stage0: a step has 24 samples instead of 16, lr 0.1 x 1.5 = 0.15"


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            {"type": "CosineAnnealingLR", "params": {"T_max": 4, "eta_min": 0.001}},
            {"T_max": 4, "eta_min": 0.004},
        ),
        (
            {"type": "OneCycleLR", "params": {"max_lr": [0.1, 0.2], "total_steps": 9}},
            {"max_lr": [0.4, 0.8], "total_steps": 9},
        ),
        (
            {"type": "CyclicLR", "params": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5}},
            {"base_lr": 0.04, "max_lr": 0.4, "step_size_up": 5},
        ),
        (
            {"type": "ReduceLROnPlateau", "params": {"mode": "max", "min_lr": 0.001}},
            {"mode": "max", "min_lr": 0.004},
        ),
        (
            {"type": "StepLR", "params": {"step_size": 2, "gamma": 0.1}},
            {"step_size": 2, "gamma": 0.1},
        ),
    ],
)
def test_rates_of_a_scheduler_are_scaled_and_its_factors_are_not(tmp_path, scheduler, expected):
    experiment, _ = scaled(tmp_path, {"scheduler": scheduler, "data": data(32)})
    assert experiment.stages[0].schedulers[0].component.params == expected
    assert experiment.resolved["stages"][0]["scheduler"]["params"] == expected


def test_every_scheduler_of_a_row_is_scaled_and_keeps_its_place_in_it(tmp_path):
    row = [
        {"type": "LinearLR", "params": {"start_factor": 0.1}, "unit": "steps", "until": 2},
        {"type": "CosineAnnealingLR", "params": {"T_max": 4, "eta_min": 0.001}},
    ]
    experiment, _ = scaled(tmp_path, {"scheduler": row, "data": data(16)})
    first, second = experiment.stages[0].schedulers
    assert (first.component.params, first.unit, first.until) == ({"start_factor": 0.1}, "steps", 2)
    assert second.component.params == {"T_max": 4, "eta_min": 0.002}
    assert experiment.resolved["stages"][0]["scheduler"] == [
        row[0],
        {"type": "CosineAnnealingLR", "params": {"T_max": 4, "eta_min": 0.002}},
    ]


def test_each_stage_has_the_factor_of_its_own_steps(tmp_path):
    later = {"name": "later", "data": data(32), "optimizer": ADAM}
    experiment, lines = scaled(tmp_path, {"data": data(4)}, later, base=8)
    rates = [stage.optimizer.component.params["lr"] for stage in experiment.stages]
    assert rates == [0.05, 0.04]
    assert lines == [
        "stage stage0: a step has 4 samples instead of 8, lr 0.1 x 0.5 = 0.05",
        "stage later: a step has 32 samples instead of 8, lr 0.01 x 4 = 0.04",
    ]


def test_what_the_file_said_is_not_written_to(tmp_path):
    before = toy_experiment(tmp_path, {"optimizer": {**ADAM, "groups": [{"match": ["bias"]}]}})
    text, described = resolved_text(before), before.stages
    scale_learning_rates(before, 2)
    assert resolved_text(before) == text
    assert before.stages == described
    assert before.stages[0].optimizer.component.params["lr"] == 0.01


def test_resolved_is_a_file_that_loads_with_the_new_values(tmp_path):
    cosine = {"type": "CosineAnnealingLR", "params": {"T_max": 4, "eta_min": 0.001}}
    groups = [{"match": ["student.head"], "params": {"lr": 0.5}}]
    stage = {"optimizer": {**ADAM, "groups": groups}, "scheduler": cosine, "data": data(16)}
    experiment, _ = scaled(tmp_path, stage)
    loaded = again(experiment, tmp_path)
    (ours,), (theirs,) = experiment.stages, loaded.stages
    assert theirs.optimizer.component.params == ours.optimizer.component.params
    assert theirs.optimizer.component.params["lr"] == 0.02
    assert theirs.optimizer.groups[0].params == {"lr": 1.0}
    assert theirs.schedulers[0].component.params == {"T_max": 4, "eta_min": 0.002}


def test_resolved_has_the_rate_of_a_stage_that_inherits_its_optimizer(tmp_path):
    """Scaled once for each stage, by the stage's own factor, though one text describes it."""
    cosine = {"type": "CosineAnnealingLR", "params": {"T_max": 4, "eta_min": 0.001}}
    groups = [{"match": ["student.head"], "params": {"lr": 0.5}}]
    first = {"optimizer": {**ADAM, "groups": groups}, "scheduler": cosine, "data": data(16)}
    experiment, _ = scaled(tmp_path, first, {"name": "same"}, {"name": "more", "data": data(32)})
    assert [s.optimizer.component.params["lr"] for s in experiment.stages] == [0.02, 0.02, 0.04]
    loaded = again(experiment, tmp_path)
    for ours, theirs in zip(experiment.stages, loaded.stages, strict=True):
        assert theirs.optimizer.component.params == ours.optimizer.component.params
        assert theirs.optimizer.groups[0].params == ours.optimizer.groups[0].params
        assert theirs.schedulers[0].component.params == ours.schedulers[0].component.params


def test_rates_that_stages_share_by_an_anchor_are_each_scaled_once(tmp_path):
    file = tmp_path / "exp.yaml"
    toy_experiment(tmp_path, {"data": data(16)}, {"name": "more", "data": data(32)})
    plain = yaml.safe_load((tmp_path / "toy.yaml").read_text())
    plain["x-optimizer"] = plain["stages"][0]["optimizer"]
    plain["stages"][1]["optimizer"] = plain["stages"][0]["optimizer"]
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    assert "*id001" in file.read_text()
    experiment, _ = scale_learning_rates(load(file), 8)
    assert [resolved_optimizer(experiment, n)["params"]["lr"] for n in (0, 1)] == [0.2, 0.4]


def test_a_rate_that_is_not_written_is_a_fault_at_the_optimizers_line(tmp_path, place):
    stages = [
        {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}},
        {"name": "good", "optimizer": ADAM},
        {"name": "bad", "optimizer": {"type": "Adam"}},
    ]
    experiment = toy_experiment(tmp_path, *stages)
    with pytest.raises(ConfigError) as caught:
        scale_learning_rates(experiment, 8)
    first, second = caught.value.faults
    assert first.path == "stages.stage0.optimizer"
    assert second.path == "stages.bad.optimizer"
    assert first.message == "--scale-lr: write params.lr of AdamW"
    text = (tmp_path / "toy.yaml").read_text()
    assert f"{first.location.line}:{first.location.column}" == place(text, "optimizer:")
    assert second.location.line == text[: text.rindex("optimizer:")].count("\n") + 1


@pytest.mark.usefixtures("only_core")
def test_the_command_says_what_was_scaled_and_trains_with_it(tmp_path, toys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_experiment(tmp_path, {"epochs": 1, "data": data(10, accumulate=2)})
    command = ["run", "-p", str(toys), "toy.yaml", "--scale-lr", "5"]
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.stderr) == (0, "")
    said = "stage stage0: a step has 20 samples instead of 5, lr 0.1 x 4 = 0.4"
    assert said in result.stdout.splitlines()
    written = read(tmp_path / "runs" / "toy" / "resolved.yaml").data
    assert written["stages"][0]["optimizer"]["params"]["lr"] == 0.4
    by_hand = toy_experiment(
        tmp_path / "hand",
        {
            "epochs": 1,
            "data": data(10, accumulate=2),
            "optimizer": {"type": "SGD", "params": {"lr": 0.4, "momentum": 0.9}},
        },
    )
    distill.run(by_hand, registry=toy_registry(), runs=tmp_path / "hand")
    ours, theirs = (
        folder / "toy" / "stage0" / "last.safetensors"
        for folder in (tmp_path / "runs", tmp_path / "hand")
    )
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.usefixtures("only_core")
def test_the_command_ends_with_the_place_of_a_rate_that_is_not_written(tmp_path, toys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_experiment(tmp_path, {"optimizer": {"type": "Adam"}})
    command = ["run", "-p", str(toys), "toy.yaml", "--scale-lr", "5"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("toy.yaml:")
    assert result.stderr.endswith("stages.stage0.optimizer: --scale-lr: write params.lr of Adam\n")
    assert not (tmp_path / "runs").exists()
