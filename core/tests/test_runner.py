"""Whole runs; the test of several processes lets them run this file."""

import json
import sys
import weakref
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from distill import ConfigError, DataError, DistillError, Observer, StorageError, check, load, run
from distill.beginning import open_sources
from distill.model_evaluation import evaluate
from distill.testing import ToyMLP, run_processes, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.checkpoint import load_state

IMAGES = {
    "train": {
        "type": "ToyData",
        "params": {"size": 20, "shape": [1, 4, 4]},
        "transforms": [{"type": "Noise"}],
    },
    "val": {"type": "ToyData", "params": {"size": 12, "shape": [1, 4, 4], "seed": 1}},
}
NETS = {
    "wide": {"type": "ToyConvNet", "params": {"width": 6}},
    "coach": {"type": "ToyConvNet", "params": {"width": 6}, "seed": 1},
    "thin": {"type": "ToyConvNet"},
}
TEACH = {
    "name": "teach",
    "student": {"model": "wide"},
    "scheduler": {"type": "StepLR", "params": {"step_size": 1}},
}
HINT = {
    "name": "hint",
    "epochs": 3,
    "teachers": {"teacher": {"model": "wide"}, "coach": {"model": "coach", "mode": "train"}},
    "student": {"model": "thin"},
    "auxiliary": {
        "regressor": {
            "type": "Conv2d",
            "params": {"in_channels": 4, "out_channels": 6, "kernel_size": 1},
            "inputs": {"input": "student.relu"},
        }
    },
    "criterion": {
        "ce": {"type": "CrossEntropyLoss"},
        "hint": {"type": "MSELoss", "inputs": {"input": "regressor", "target": "coach.relu"}},
        "scaled": {"type": "Scaled", "weight": 0.5},
    },
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "scheduler": {"type": "ReduceLROnPlateau", "params": {"mode": "max", "patience": 0}},
    "precision": "fp16",
    "metrics": ["accuracy", "MeanLogit"],
    "keep": "best",
}
KD = {
    "name": "kd",
    "epochs": 2,
    "teachers": {"coach": {"model": "coach"}},
    "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
    "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 2}},
    "precision": "fp32",
    "metrics": ["accuracy"],
    "freeze": ["student.conv"],
}


class Noise:
    """A transform that draws."""

    def __call__(self, value):
        return value + 0.1 * torch.randn(value.shape)


class Scaled(nn.Module):
    """A loss with a parameter that draws."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, student):
        return (self.scale * student - torch.rand(()) - torch.rand(())).square().mean()


class Killed(Exception):
    """Stands in for a kill."""


class Bomb(Observer):
    """Ends the run at one event, named as ``name`` or ``(name, seed, stage, epoch)``."""

    def __init__(self, *at):
        self.at, self.heard = at, []

    def __getattribute__(self, name):
        if name in ("run_start", "stage_start", "step_end", "epoch_end", "stage_end", "run_end"):
            return lambda event: self.hear(name, event)
        return super().__getattribute__(name)

    def hear(self, name, event):
        place = getattr(event, "position", None)
        here = (name,) if place is None else (name, place.seed, place.stage, place.epoch)
        self.heard.append(here)
        if here == self.at:
            raise Killed


class MeanLogit:
    """A metric that every change of a model shows in, and whose value is a number of numpy's."""

    def reset(self):
        self.logits = []

    def update(self, output, batch):
        self.logits += output[:, 0].tolist()

    def compute(self):
        return numpy.mean(self.logits)


def registry(observer=None):
    return toy_registry(
        transforms={"Noise": Noise},
        losses={"Scaled": Scaled},
        metrics={"MeanLogit": MeanLogit},
        observers={"Bomb": lambda: observer or Bomb()},
    )


def stages_of(folder, *stages, **keys):
    settings = {"datasets": IMAGES, "models": NETS, "log_every": 1, "seeds": [3], **keys}
    return toy_experiment(folder, *stages, **settings)


def distillation(folder, **keys):
    observers = ["ResultFiles", "Bomb"]
    test = {"dataset": "val", "metrics": ["accuracy"]}
    return stages_of(folder, TEACH, HINT, KD, observers=observers, test=test, **keys)


def run_until_done(folder, *kills, **keys):
    """Run, be killed at each of ``kills`` in turn, and finish; return what is left behind."""
    experiment = distillation(folder, **keys)
    for kill in kills:
        with pytest.raises(Killed):
            run(experiment, registry=registry(Bomb(*kill)), runs=folder / "runs")
    result = run(experiment, registry=registry(), runs=folder / "runs")
    files = {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")
    }
    return (
        files,
        [timeless(vars(stage)) for stage in result.stages],
        events_of(folder / "runs" / "toy"),
    )


def events_of(directory):
    """What the metrics file says but for the beginnings of stages."""
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    events = [timeless(json.loads(line)) for line in lines]
    return [event for event in events if event["event"] != "stage_start"]


def timeless(value):
    """The same without what a clock says."""
    if isinstance(value, dict):
        clocks = ("seconds", "samples_per_second", "teacher_share", "peak_memory", "speed")
        return {key: timeless(item) for key, item in value.items() if key not in clocks}
    return value


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_until_done(tmp_path_factory.mktemp("uninterrupted"))


def test_stages_run_one_after_another_and_leave_their_students(tmp_path):
    result = run(distillation(tmp_path), registry=registry(), runs=tmp_path / "runs")
    assert [(r.stage, r.student) for r in result.stages] == [
        ("teach", "wide"),
        ("hint", "thin"),
        ("kd", "thin"),
    ]
    quality = result.stages[1].teachers["teacher"]
    assert quality["accuracy"] == result.stages[0].validation["accuracy"]
    assert result.directory == tmp_path / "runs" / "toy"
    left = sorted(str(f.relative_to(result.directory)) for f in result.directory.glob("*/*"))
    expected = [f"{s}/{w}.safetensors" for s in ("hint", "kd", "teach") for w in ("best", "last")]
    assert left == expected
    for stage in ("teach", "hint", "kd"):
        assert stage in result.table


def test_a_student_is_given_back_in_its_plain_class(tmp_path):
    result = run(distillation(tmp_path), registry=registry(), runs=tmp_path / "runs")
    student = result.student("kd")  # by default what the stage kept, which is "best" here
    for weights, given in (("best", student), ("last", result.student("kd", weights="last"))):
        saved = safetensors.torch.load_file(result.directory / "kd" / f"{weights}.safetensors")
        for name, value in given.state_dict().items():
            assert torch.equal(value, saved[name])
    assert not student.relu._forward_hooks
    assert student.relu.inplace
    name, measured = evaluate(result.experiment, result.registry, student)
    assert (name, measured) == ("val", dict(result.stages[-1].test))


def test_the_same_file_gives_the_same_bits_twice(tmp_path, uninterrupted):
    torch.rand(5), numpy.random.rand(5)
    assert run_until_done(tmp_path) == uninterrupted


def test_number_of_workers_does_not_change_a_bit(tmp_path):
    found = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        data = {"train": "train", "validate": "val", "batch_size": 8, "workers": workers}
        experiment = stages_of(folder, {**TEACH, "data": data})
        result = run(experiment, registry=registry(), runs=folder / "runs")
        found.append((result.directory / "teach" / "last.safetensors").read_bytes())
    assert found[0] == found[1]


def test_another_seed_gives_another_student(tmp_path, uninterrupted):
    files, *_ = run_until_done(tmp_path, seeds=[4])
    name = "runs/toy/kd/last.safetensors"
    assert files[name] != uninterrupted[0][name]


@pytest.mark.parametrize(
    "kills",
    [
        [("step_end", 3, 0, 0)],
        [("epoch_end", 3, 0, 1)],
        [("epoch_end", 3, 0, 2)],
        [("stage_end", 3, 1, 0)],
        [("stage_start", 3, 1, 0)],
        [("epoch_end", 3, 1, 1)],
        [("epoch_end", 3, 1, 2)],
        [("step_end", 3, 1, 2)],
        [("stage_end", 3, 2, 0)],
        [("step_end", 3, 2, 0)],
        [("epoch_end", 3, 2, 2)],
        [("stage_end", 3, 3, 0)],
        [("run_end",)],
        [("epoch_end", 3, 0, 1), ("step_end", 3, 1, 1), ("step_end", 3, 1, 2), ("run_end",)],
    ],
    ids=lambda kills: " then ".join(f"{name} {' '.join(map(str, at))}" for name, *at in kills),
)
def test_a_killed_run_goes_on_to_the_bits_of_an_uninterrupted_one(tmp_path, uninterrupted, kills):
    files, results, events = run_until_done(tmp_path, *kills)
    assert files == uninterrupted[0]
    assert results == uninterrupted[1]
    assert events == uninterrupted[2]


def test_several_seeds_are_each_a_run_of_their_own_and_go_on_from_a_kill(tmp_path, uninterrupted):
    whole = run_until_done(tmp_path / "whole", seeds=[3, 5])
    killed = run_until_done(
        tmp_path / "killed", ("step_end", 3, 1, 1), ("epoch_end", 5, 1, 1), seeds=[3, 5]
    )
    assert killed == whole
    files, results, _ = whole
    assert (
        files["runs/toy/seed-3/kd/last.safetensors"]
        == (uninterrupted[0]["runs/toy/kd/last.safetensors"])
    )
    assert (
        files["runs/toy/seed-5/kd/last.safetensors"]
        != (files["runs/toy/seed-3/kd/last.safetensors"])
    )
    assert [result["seed"] for result in results] == [3, 3, 3, 5, 5, 5]


class Roll(Observer):
    """Notes at the beginning of each stage which of the models that were built are still there."""

    def __init__(self):
        self.built, self.there, self.rehearsed = [], {}, {}

    def build(self, name):
        model = ToyMLP()
        model.register_forward_pre_hook(lambda *_: self.called(name))
        self.built.append((name, weakref.ref(model)))
        return model

    def alive(self):
        return {name for name, model in self.built if model() is not None}

    def called(self, name):
        if not self.there and name not in self.rehearsed:
            self.rehearsed[name] = self.alive()

    def stage_start(self, event):
        self.there[event.name] = self.alive()


def chain(folder, roll):
    """Run three stages, each of which has the student of the one before as its teacher."""
    names = ("big", "mid", "small")
    models = {name: {"type": "Named", "params": {"name": name}} for name in names}
    stages = [
        {
            "name": f"to_{name}",
            "student": {"model": name},
            **({"teacher": {"model": of}} if of else {}),
        }
        for of, name in zip((None, *names), names, strict=False)
    ]
    parts = toy_registry(models={"Named": roll.build}, observers={"Roll": lambda: roll})
    experiment = toy_experiment(folder, *stages, models=models, observers=["Roll"])
    return run(experiment, registry=parts, runs=folder / "runs")


def test_a_model_lives_and_is_saved_until_the_last_stage_that_runs_it(tmp_path):
    roll = Roll()
    directory = chain(tmp_path, roll).directory
    assert roll.there == {
        "to_big": {"big", "mid", "small"},
        "to_mid": {"big", "mid", "small"},
        "to_small": {"mid", "small"},
    }
    assert roll.rehearsed == {
        "big": {"big", "mid", "small"},
        "mid": {"big", "mid", "small"},
        "small": {"mid", "small"},
    }
    assert load_state(directory / "checkpoint.pt")["models"].keys() == {"mid", "small"}
    assert (directory / "to_big" / "last.safetensors").exists()


def test_a_completed_run_trains_nothing_again(tmp_path):
    experiment = distillation(tmp_path)
    first = run(experiment, registry=registry(), runs=tmp_path / "runs")
    before = {f: f.stat().st_mtime_ns for f in first.directory.rglob("*.safetensors")}
    bomb = Bomb()
    again = run(experiment, registry=registry(bomb), runs=tmp_path / "runs")
    assert [name for name, *_ in bomb.heard] == ["run_start", "run_end"]
    assert again.stages == first.stages
    assert {f: f.stat().st_mtime_ns for f in first.directory.rglob("*.safetensors")} == before


def test_a_changed_file_under_the_same_name_is_refused_and_nothing_is_lost(tmp_path):
    run(distillation(tmp_path), registry=registry(), runs=tmp_path / "runs")
    left = {f: f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file()}
    with pytest.raises(ConfigError, match=r"seeds\[0\]: 3 -> 4"):
        run(distillation(tmp_path, seeds=[4]), registry=registry(), runs=tmp_path / "runs")
    assert {f: f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file()} == left


def test_a_damaged_checkpoint_is_told_and_nothing_else_is_touched(tmp_path):
    experiment = distillation(tmp_path)
    result = run(experiment, registry=registry(), runs=tmp_path / "runs")
    checkpoint = result.directory / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"checkpoint\.pt is damaged"):
        run(experiment, registry=registry(), runs=tmp_path / "runs")
    assert (result.directory / "kd" / "last.safetensors").exists()


def test_a_metric_may_give_a_number_of_numpy(tmp_path):
    stage = {**TEACH, "metrics": ["MeanLogit"]}
    experiment = stages_of(tmp_path, stage, {"name": "more"}, observers=["Bomb"])
    with pytest.raises(Killed):
        run(experiment, registry=registry(Bomb("stage_start", 3, 1, 0)), runs=tmp_path / "runs")
    run(experiment, registry=registry(), runs=tmp_path / "runs")


def test_a_later_stage_that_cannot_work_is_told_before_the_first_one_trains(tmp_path):
    bad = {"hint": {"type": "MSELoss", "inputs": {"input": "student", "target": "student.relu"}}}
    bomb = Bomb()
    experiment = stages_of(tmp_path, TEACH, {"name": "bad", "criterion": bad}, observers=["Bomb"])
    with pytest.raises(ConfigError, match=r"stages\.bad\.criterion\.hint: MSELoss failed on"):
        run(experiment, registry=registry(bomb), runs=tmp_path / "runs")
    assert bomb.heard == []
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_check_without_data_opens_none(tmp_path):
    datasets = {"train": {"type": "ToyData", "params": {"size": 0}}}
    data = {"train": "train", "batch_size": 8}
    experiment = toy_experiment(tmp_path, {"data": data}, datasets=datasets)
    check(experiment, toy_registry())
    with pytest.raises(DataError, match=r"datasets\.train: the data set is empty"):
        check(experiment, toy_registry(), data=True)


def test_what_a_data_set_draws_when_it_is_built_is_the_same_always(tmp_path):
    class Subset:
        def __init__(self):
            self.chosen = [*torch.randperm(50)[:4].tolist(), int(numpy.random.randint(1000))]

        def __len__(self):
            return 5

    parts = toy_registry(datasets={"Subset": Subset})
    datasets = {name: {"type": "Subset"} for name in ("train", "val")}
    builder = Builder(toy_experiment(tmp_path, {}, datasets=datasets), parts)
    first, second = (open_sources(builder) for _ in range(2))
    assert first["train"].dataset.chosen == second["train"].dataset.chosen
    assert first["train"].dataset.chosen != first["val"].dataset.chosen


def test_a_checkpoint_of_another_architecture_is_told_at_its_line(tmp_path):
    result = run(toy_experiment(tmp_path, {}), registry=toy_registry(), runs=tmp_path / "runs")
    file = str(result.directory / "stage0" / "last.safetensors")
    other = {"mlp": {"type": "ToyMLP", "params": {"hidden": 5}, "checkpoint": file}}
    experiment = toy_experiment(tmp_path, {}, models=other, name="other")
    with pytest.raises(ConfigError, match=r"models\.mlp\.checkpoint: .* of another architecture"):
        run(experiment, registry=toy_registry(), runs=tmp_path / "runs")


def test_a_checkpoint_in_the_file_is_where_a_model_starts_from(tmp_path):
    result = run(toy_experiment(tmp_path, {}), registry=toy_registry(), runs=tmp_path / "runs")
    file = str(result.directory / "stage0" / "last.safetensors")
    models = {"mlp": {"type": "ToyMLP", "checkpoint": file}}
    experiment = toy_experiment(tmp_path, {}, models=models, seed=9)
    model = Builder(experiment, toy_registry()).model("mlp", 9)
    assert isinstance(model, ToyMLP)
    assert torch.equal(model.head.weight, result.student().head.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [("vall", "there is no data set 'vall' in .*; did you mean val?"), ("x", "there are: train")],
)
def test_evaluation_on_an_unknown_data_set_is_answered_with_the_known(tmp_path, name, message):
    experiment = toy_experiment(tmp_path, {})
    with pytest.raises(DistillError, match=message):
        evaluate(experiment, toy_registry(), ToyMLP(), dataset=name)


def test_observers_are_closed_whatever_happens(tmp_path):
    closed = []

    class Closing(Observer):
        def epoch_end(self, event):
            raise Killed

        def close(self):
            closed.append(True)

    parts = toy_registry(observers={"Closing": Closing})
    with pytest.raises(Killed):
        run(toy_experiment(tmp_path, {}, observers=["Closing"]), registry=parts, runs=tmp_path)
    assert closed == [True]


def test_two_processes_come_to_the_parameters_of_one(tmp_path):
    # Seventeen samples: the last batch of an epoch leaves one process idle.
    train = {**IMAGES["train"], "params": {"size": 17, "shape": [1, 4, 4]}}
    kd = {"type": "MSELoss", "weight": 0.5, "inputs": {"input": "student", "target": "teacher"}}
    terms = {"ce": HINT["criterion"]["ce"], "hint": HINT["criterion"]["hint"], "kd": kd}
    sgd = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
    both = {**HINT, "criterion": terms, "optimizer": sgd, "precision": "fp32", "scheduler": None}
    both["metrics"] = ["accuracy"]
    # Without the cross entropy, the student's head gets no gradient.
    hint_alone = {"name": "hint-alone", "criterion": {"hint": terms["hint"]}}
    stages_of(
        tmp_path,
        {**TEACH, "optimizer": sgd},
        both,
        hint_alone,
        datasets={**IMAGES, "train": train},
        observers=["ResultFiles"],
        test={"dataset": "val", "metrics": ["accuracy"]},
    )
    run_file(tmp_path / "toy.yaml", tmp_path / "one")
    run_processes(__file__, str(tmp_path / "toy.yaml"), str(tmp_path / "two"))
    one, two = tmp_path / "one" / "toy", tmp_path / "two" / "toy"
    students = sorted(file.relative_to(one) for file in one.rglob("last.safetensors"))
    assert len(students) == 3
    for file in students:
        expected, found = (safetensors.torch.load_file(folder / file) for folder in (one, two))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for expected, found in zip(events_of(one), events_of(two), strict=True):
        assert found.pop("losses", {}) == pytest.approx(expected.pop("losses", {}), abs=1e-6)
        assert found == expected


def run_file(file, runs):
    run(load(file), registry=registry(), runs=runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_file(*map(Path, sys.argv[1:]))


def test_data_to_measure_on_is_rehearsed_before_anything_trains(tmp_path):
    datasets = {
        "train": {"type": "ToyData", "params": {"size": 20}},
        "val": {"type": "ToyData", "params": {"size": 12}},
        "five": {"type": "ToyData", "params": {"size": 10, "classes": 5}},
    }
    experiment = toy_experiment(tmp_path, {}, datasets=datasets, test={"dataset": "five"})
    with pytest.raises(DataError, match="'mlp' has 3 outputs, but data set 'five' has 5 classes"):
        run(experiment, registry=toy_registry(), runs=tmp_path)
    assert not (tmp_path / "toy" / "checkpoint.pt").exists()


def test_the_resolved_file_gives_the_same_run_with_modules_that_are_carried_on(tmp_path):
    hint = {
        "teacher": {"model": "wide"},
        "auxiliary": {
            "regressor": {
                "type": "Linear",
                "params": {"in_features": 8, "out_features": 12},
                "inputs": {"input": "student.body"},
            }
        },
        "criterion": {
            "hint": {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.body"}}
        },
    }
    experiment = toy_experiment(tmp_path, hint, {"name": "longer"})
    given = run(experiment, registry=toy_registry(), runs=tmp_path / "given")
    again = load(given.directory / "resolved.yaml")
    resolved = run(again, registry=toy_registry(), runs=tmp_path / "resolved")
    files = [result.directory / "longer/last.safetensors" for result in (given, resolved)]
    assert files[0].read_bytes() == files[1].read_bytes()
