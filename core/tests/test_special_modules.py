"""Modules around a model, which call it in another way."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import Batch, ConfigError, DistillError, Observer, check, run
from distill.builtin.special_modules import WithTargets
from distill.model_evaluation import evaluate
from distill.testing import ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.seed_run import SeedRun
from distill.training.trainer import train_stage

CPU = torch.device("cpu")


class Detector(ToyMLP):
    """Gives its losses in training, and logits otherwise."""

    def forward(self, inputs, targets=None):
        logits = super().forward(inputs)
        if not self.training:
            assert targets is None
            return logits
        return {"ce": F.cross_entropy(logits, targets), "size": 0.01 * logits.square().mean()}


class Spare(Detector):
    """Has a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Flipped(nn.Module):
    """Calls a model with other inputs than the batch's: a model works with it or not at all."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(-batch.inputs)


class Told(nn.Module):
    """Writes down what it is told, with the model's mode."""

    log: list = []  # noqa: RUF012

    def __init__(self, model, name="student"):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, batch):
        if self.training:
            self.log.append((self.name, "step"))
        return self.model(batch.inputs)

    def stage_start(self):
        self.log.append((self.name, "stage_start"))

    def epoch_start(self, epoch):
        self.log.append((self.name, "epoch_start", epoch))

    def epoch_end(self, epoch):
        self.log.append((self.name, "epoch_end", epoch))

    def stage_end(self):
        self.log.append((self.name, "stage_end"))


class OwnWeights(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return self.model(batch.inputs) * self.scale


class OwnBuffer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        return self.model(batch.inputs)


class Killed(Exception):
    """Stands in for a kill."""


class Bomb(Observer):
    def step_end(self, event):
        if event.position.epoch == 1:
            raise Killed


def registry(**observers):
    around = (Flipped, Told, OwnWeights, OwnBuffer)
    return toy_registry(
        models={"Detector": Detector, "Spare": Spare},
        special_modules={cls.__name__: cls for cls in around},
        observers={"Bomb": Observer, **observers},
    )


@pytest.fixture
def log():
    Told.log.clear()
    return Told.log


def seed_run(folder, *stages, **keys):
    experiment = toy_experiment(folder, *stages, **keys)
    builder = Builder(experiment, registry())
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, 0, CPU, folder / "run", lambda *_: None, models, sources)


def batch():
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    return Batch(inputs, torch.arange(5) % 3, torch.arange(5))


def student(special, **more):
    return {"student": {"model": "mlp", "special": special, **more}}


DETECT = {**student("WithTargets"), "criterion": {"own": {"type": "ModelLoss"}}}
DETECTORS = {"models": {"mlp": {"type": "Detector"}}}


def test_a_model_gets_the_targets_in_training_only():
    special, data = WithTargets(Detector()), batch()
    logits = special.model.eval()(data.inputs)
    losses = special.train()(data)
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits, data.targets))
    assert torch.equal(special.eval()(data), logits)


def test_a_model_that_computes_its_own_loss_trains_and_is_measured_by_its_logits(tmp_path):
    result = train_stage(seed_run(tmp_path, {**DETECT, "epochs": 20}, **DETECTORS), 0)
    assert result.validation["accuracy"] >= 0.9


def test_such_a_stage_comes_to_the_weights_of_one_with_the_loss_written_out(tmp_path):
    size = {"type": "MSELoss", "weight": 0.01, "inputs": {"input": "student", "target": "zero"}}
    zero = {"type": "Zero", "inputs": {"like": "student"}}

    class Zero(nn.Module):
        def forward(self, like):
            return torch.zeros_like(like)

    own = seed_run(tmp_path / "own", DETECT, **DETECTORS)
    train_stage(own, 0)
    plain = {"criterion": {"ce": {"type": "CrossEntropyLoss"}, "size": size}}
    written = seed_run(tmp_path / "plain", {**plain, "auxiliary": {"zero": zero}})
    written.builder.registry = toy_registry(auxiliary_modules={"Zero": Zero})
    train_stage(written, 0)
    expected = written.models["mlp"].state_dict()
    for name, value in own.models["mlp"].state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_a_model_with_its_own_loss_may_have_parameters_that_nothing_reaches(tmp_path):
    stage = {**DETECT, **student("WithTargets", redesign="whole")}
    train_stage(seed_run(tmp_path, stage, models={"mlp": {"type": "Spare"}}), 0)


def test_a_data_set_of_one_sample_can_be_rehearsed(tmp_path):
    one = {"train": {"type": "ToyData", "params": {"size": 1}}}
    stage = {**DETECT, "data": {"train": "train", "batch_size": 1}}
    check(toy_experiment(tmp_path, stage, datasets=one, **DETECTORS), registry(), data=True)


@pytest.mark.parametrize("ema", [False, True])
def test_student_and_average_are_measured_through_it(tmp_path, ema):
    """With inputs turned round, a model trained so is right and one called as usual is not."""
    stage = {**student("Flipped"), "epochs": 15, **({"ema": {"decay": 0.5}} if ema else {})}
    ready = seed_run(tmp_path, stage, test={"dataset": "val", "metrics": ["accuracy"]})
    result = train_stage(ready, 0)
    names = ["accuracy", "ema.accuracy"] if ema else ["accuracy"]
    assert list(result.validation) == names
    assert all(value >= 0.8 for value in result.validation.values())
    assert result.test["accuracy"] == result.validation["accuracy"]
    data = ready.sources["val"].dataset
    model = ready.models["mlp"]
    plain = (model(data.inputs).argmax(1) == torch.tensor(data.labels)).float().mean()
    flipped = (model(-data.inputs).argmax(1) == torch.tensor(data.labels)).float().mean()
    assert flipped == pytest.approx(result.validation["accuracy"])
    assert plain < flipped


def test_a_teacher_teaches_and_is_measured_through_it(tmp_path):
    first = {**student("Flipped"), "epochs": 15}
    imitate = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
    second = {
        "student": {"model": "wide"},
        "teacher": {"model": "mlp", "special": "Flipped"},
        "criterion": {"kd": imitate},
        "epochs": 20,
        "optimizer": {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9}},
        "metrics": ["accuracy", "agreement"],
    }
    ready = seed_run(tmp_path, first, second)
    reached = train_stage(ready, 0).validation["accuracy"]
    result = train_stage(ready, 1)
    assert result.teachers["teacher"]["accuracy"] == reached
    assert result.validation["agreement"] >= 0.9
    plain = {**second, "teacher": {"model": "mlp"}, "name": "stage1"}
    other = seed_run(tmp_path / "plain", first, plain)
    train_stage(other, 0)
    assert train_stage(other, 1).teachers["teacher"]["accuracy"] < reached


def test_a_trained_model_is_evaluated_through_it_after_the_run(tmp_path):
    stage = {**student("Flipped"), "epochs": 15}
    test = {"dataset": "val", "metrics": ["accuracy"]}
    result = run(toy_experiment(tmp_path, stage, test=test), registry=registry(), runs=tmp_path)
    model = result.student()
    assert isinstance(model, ToyMLP)
    assert evaluate(result.experiment, registry(), model)[1] == result.stages[0].test


def test_references_into_the_model_are_those_without_it(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "student.body.0"}}
    ready = seed_run(tmp_path, {**student("Flipped"), "criterion": {"hint": hint}})
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    values, model = assembly.distiller.values(batch()), assembly.roles["student"]
    assembly.distiller.release()
    torch.testing.assert_close(values["student.body"], model.body(-batch().inputs))


STEPS = [("student", "step")] * 3  # 20 samples, 8 a step


def epoch(number):
    return [
        *((name, "epoch_start", number) for name in ("student", "teacher")),
        *STEPS,
        *((name, "epoch_end", number) for name in ("student", "teacher")),
    ]


def both(event):
    return [("student", event), ("teacher", event)]


TOLD = {
    **student("Told"),
    "teacher": {"model": "wide", "special": {"type": "Told", "params": {"name": "teacher"}}},
    "criterion": {"kd": {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}},
}


def test_it_is_told_when_stages_and_epochs_begin_and_end(tmp_path, log):
    train_stage(seed_run(tmp_path, TOLD), 0)
    rehearsed = [entry for entry in log if entry[1:] != ("step",)]
    assert rehearsed == [e for e in whole_stage() if e[1:] != ("step",)]
    assert log[log.index(("student", "stage_start")) :] == whole_stage()


def whole_stage():
    return [*both("stage_start"), *epoch(0), *epoch(1), *both("stage_end")]


def test_after_a_kill_the_stage_begins_again_for_it_with_the_epoch_that_is_left(tmp_path, log):
    experiment = toy_experiment(tmp_path, TOLD, observers=["Bomb"], log_every=1)
    with pytest.raises(Killed):
        run(experiment, registry=registry(Bomb=Bomb), runs=tmp_path)
    log.clear()
    run(experiment, registry=registry(), runs=tmp_path)
    told = log[log.index(("student", "stage_start")) :]
    assert told == [*both("stage_start"), *epoch(1), *both("stage_end")]


def test_what_it_is_not_interested_in_it_need_not_have(tmp_path):
    assert "accuracy" in train_stage(seed_run(tmp_path, student("Flipped")), 0).validation


@pytest.mark.parametrize(("special", "own"), [("OwnWeights", "scale"), ("OwnBuffer", "calls")])
def test_parameters_and_buffers_of_its_own_are_refused(tmp_path, special, own):
    with pytest.raises(ConfigError) as caught:
        check(toy_experiment(tmp_path, student(special)), registry())
    (fault,) = caught.value.faults
    assert fault.path == "stages.stage0.student.special"
    assert fault.message == (
        f"{special} has parameters or buffers of its own ({own}), which nothing would train or "
        "save; they belong into an auxiliary module"
    )


@pytest.mark.parametrize(
    ("special", "path", "message"),
    [
        ("WithTarget", "", "there is no special module 'WithTarget'; did you mean WithTargets"),
        ({"type": "Told", "params": {"nam": "x"}}, ".params.nam", "did you mean name"),
        ({"type": "Told", "params": {"model": "x"}}, ".params.model", "special module Told"),
    ],
)
def test_one_that_cannot_be_is_told_at_its_line(tmp_path, special, path, message):
    with pytest.raises(ConfigError) as caught:
        check(toy_experiment(tmp_path, student(special)), registry())
    (fault,) = caught.value.faults
    assert fault.path == f"stages.stage0.student.special{path}"
    assert message in fault.message


def test_one_that_fails_is_told_at_its_model(tmp_path):
    class Failing(Flipped):
        def forward(self, batch):
            return self.model(batch.extras["views"])

    builder_registry = toy_registry(special_modules={"Failing": Failing})
    with pytest.raises(DistillError, match=r"stages\.stage0\.student: ToyMLP fails on data set"):
        check(toy_experiment(tmp_path, student("Failing")), builder_registry, data=True)


def test_the_model_itself_is_left_as_it_was(tmp_path):
    ready = seed_run(tmp_path, student("Flipped"))
    model = ready.models["mlp"]
    before = copy.copy(vars(model)), list(model.state_dict())
    train_stage(ready, 0)
    assert vars(model).keys() == before[0].keys()
    assert list(model.state_dict()) == before[1]
