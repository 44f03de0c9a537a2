"""What a stage measures, and which measurement is the best."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from distill import ConfigError, Observer, check, run
from distill.testing import ToyData, toy_experiment, toy_registry
from distill.training.average import Average
from distill.training.build import Builder
from distill.training.measuring import Best, Measuring
from distill.training.seed_run import SeedRun

CPU = torch.device("cpu")


def measuring(folder, averaged=False, **stage):
    """What measures a stage that has a teacher."""
    distil = {"teacher": {"model": "wide"}, **stage}
    experiment = toy_experiment(folder, distil, test={"dataset": "train"})
    builder = Builder(experiment, toy_registry())
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    run = SeedRun(builder, 0, CPU, folder, lambda *_: None, models, sources)
    (described,) = experiment.stages
    average = run.average(described, models["mlp"]) if averaged else None
    roles = {"student": models["mlp"], "teacher": models["wide"]}
    return Measuring(run, described, roles, average)


def share_right(model, data):
    return (model(data.inputs).argmax(1) == torch.tensor(data.labels)).float().mean().item()


def test_best_is_the_highest_of_the_metric_that_decides():
    assert not Best().beaten_by({}, "accuracy", higher=True)
    assert Best().beaten_by({"accuracy": 0.0}, "accuracy", higher=True)
    best = Best(2, {"accuracy": 0.5, "loss": 1.0})
    assert best.beaten_by({"accuracy": 0.6, "loss": 9.0}, "accuracy", higher=True)
    assert not best.beaten_by({"accuracy": 0.5, "loss": 0.0}, "accuracy", higher=True)


def test_best_may_be_the_lowest():
    best = Best(2, {"accuracy": 0.5, "loss": 1.0})
    assert best.beaten_by({"accuracy": 0.1, "loss": 0.9}, "loss", higher=False)
    assert not best.beaten_by({"accuracy": 0.9, "loss": 1.0}, "loss", higher=False)


def test_what_is_no_number_is_never_the_best():
    assert not Best().beaten_by({"accuracy": math.nan}, "accuracy", higher=True)
    assert not Best(1, {"accuracy": 0.1}).beaten_by({"accuracy": math.nan}, "accuracy", True)


def test_the_direction_is_that_of_the_metric(tmp_path):
    stage = {"metrics": ["cross_entropy", "accuracy"]}
    best = Best(1, {"cross_entropy": 1.0, "accuracy": 0.5})
    lower = measuring(tmp_path, **stage)
    assert lower.improves(best, {"cross_entropy": 0.5, "accuracy": 0.1})
    assert not lower.improves(best, {"cross_entropy": 1.5, "accuracy": 0.9})
    higher = measuring(tmp_path, **stage, best_by="accuracy")
    assert higher.improves(best, {"cross_entropy": 1.5, "accuracy": 0.9})


def test_a_metric_has_a_name_without_a_slash_which_parts_it_from_its_parts(tmp_path):
    with pytest.raises(ConfigError, match="'top/1' does not fit here"):
        measuring(tmp_path, metrics=[{"type": "accuracy", "name": "top/1"}])


def test_nothing_is_best_where_nothing_is_measured(tmp_path):
    assert not measuring(tmp_path, metrics=[]).improves(Best(), {"accuracy": 1.0})
    assert not measuring(tmp_path).improves(Best(), {})


def test_what_decides_has_to_be_measured(tmp_path):
    decided = measuring(tmp_path, best_by="accuracy/part")
    with pytest.raises(ConfigError, match=r"'accuracy/part' is not among what is measured: acc"):
        decided.validate()


def test_the_first_validation_set_is_plain_and_others_have_their_names(tmp_path):
    data = {"train": "train", "validate": ["val", "train"], "batch_size": 8}
    measured = measuring(tmp_path, data=data, metrics=["accuracy", "cross_entropy"])
    student, sources = measured.roles["student"], measured.run.sources
    found = measured.validate()
    assert list(found) == [
        "accuracy",
        "cross_entropy",
        "train.accuracy",
        "train.cross_entropy",
    ]
    assert found["accuracy"] == pytest.approx(share_right(student, sources["val"].dataset))
    assert found["train.accuracy"] == pytest.approx(share_right(student, sources["train"].dataset))


def test_the_average_is_measured_beside_the_student(tmp_path):
    measured = measuring(tmp_path, averaged=True, ema={"decay": 0.5})
    assert isinstance(measured.average, Average)
    with torch.no_grad():
        for parameter in measured.average.model.parameters():
            parameter.zero_()
        measured.average.model.head.bias[1] = 1.0
    found = measured.validate()
    data = measured.run.sources["val"].dataset
    assert found == {
        "accuracy": pytest.approx(share_right(measured.roles["student"], data)),
        "ema.accuracy": pytest.approx(1 / 3),
    }


def test_teachers_are_measured_by_role_and_the_test_data_at_the_end(tmp_path):
    measured = measuring(tmp_path)
    sources = measured.run.sources
    right = share_right(measured.roles["teacher"], sources["val"].dataset)
    assert measured.teachers() == {"teacher": {"accuracy": pytest.approx(right)}}
    test = measured.run.builder.experiment.test
    right = share_right(measured.roles["student"], sources["train"].dataset)
    assert measured.test(test.dataset, test.metrics) == {"accuracy": pytest.approx(right)}


class Events(Observer):
    """Keeps what is measured and when, by the number of steps or of epochs that are over."""

    def __init__(self):
        self.epochs, self.evaluations = [], []

    def epoch_end(self, event):
        self.epochs.append(event)

    def evaluation_end(self, event):
        self.evaluations.append(event)


def ran(folder, *stages, **keys):
    """A run's result and what its observer heard."""
    events = Events()
    experiment = toy_experiment(folder, *stages, observers=["Events"], **keys)
    registry = toy_registry(observers={"Events": lambda: events})
    return run(experiment, registry=registry, runs=folder), events


def written(result, name, stage="stage0"):
    return load_file(result.directory / stage / f"{name}.safetensors")


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


VAL = ToyData(12, seed=1)


def cross_entropy_on_val(model):
    with torch.no_grad():
        return functional.cross_entropy(model.eval()(VAL.inputs), torch.tensor(VAL.labels)).item()


def test_a_run_tells_each_validation_set_by_its_name_and_decides_by_the_first(tmp_path):
    data = {"train": "train", "validate": ["val", "train"], "batch_size": 8}
    result, events = ran(tmp_path, {"data": data, "metrics": ["cross_entropy"], "epochs": 3})
    names = ["cross_entropy", "train.cross_entropy"]
    assert [list(event.metrics) for event in events.epochs] == [names] * 3
    student = result.student()
    assert result.stages[0].validation["cross_entropy"] == pytest.approx(
        cross_entropy_on_val(student)
    )
    train = ToyData(20)
    with torch.no_grad():
        loss = functional.cross_entropy(student(train.inputs), torch.tensor(train.labels)).item()
    assert result.stages[0].validation["train.cross_entropy"] == pytest.approx(loss)


DIVERGING = {"type": "ExponentialLR", "params": {"gamma": 6.0}}


@pytest.mark.parametrize(
    ("best_by", "name", "choose"),
    [
        (None, "accuracy", max),
        ("cross_entropy", "cross_entropy", min),
        ("train.cross_entropy", "train.cross_entropy", min),
    ],
)
def test_the_best_epoch_is_that_of_what_decides_and_its_weights_are_written(
    tmp_path, best_by, name, choose
):
    data = {"train": "train", "validate": ["val", "train"], "batch_size": 8}
    metrics = ["accuracy", "cross_entropy"]
    stage = {"data": data, "metrics": metrics, "epochs": 6, "scheduler": DIVERGING}
    result, events = ran(tmp_path, {**stage, "best_by": best_by, "keep": "best"})
    measured = [event.metrics[name] for event in events.epochs]
    best = measured.index(choose(measured))
    assert 0 < best < 5
    (of_stage,) = result.stages
    assert of_stage.best_epoch == best + 1
    assert of_stage.best == events.epochs[best].metrics
    so_far = [choose(measured[: n + 1]) for n in range(6)]
    expected = [n == 0 or so_far[n] != so_far[n - 1] for n in range(6)]
    assert [event.is_best for event in events.epochs] == expected
    kept = cross_entropy_on_val(result.student())
    assert kept == pytest.approx(events.epochs[best].metrics["cross_entropy"])
    assert cross_entropy_on_val(result.student(weights="last")) == pytest.approx(
        events.epochs[-1].metrics["cross_entropy"]
    )


@pytest.mark.parametrize(
    ("epochs", "every", "measured"), [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (2, 5, [2])]
)
def test_epochs_are_measured_every_so_often_and_at_the_end(tmp_path, epochs, every, measured):
    evaluate = {"every": every, "unit": "epochs"}
    result, events = ran(tmp_path, {"epochs": epochs, "evaluate": evaluate})
    assert [e.position.epoch for e in events.epochs if e.metrics] == measured
    assert [e.position.epoch for e in events.epochs] == list(range(1, epochs + 1))
    assert events.evaluations == []
    assert result.stages[0].validation == events.epochs[-1].metrics
    assert result.stages[0].best_epoch in measured
    assert not any(e.is_best for e in events.epochs if not e.metrics)


def test_steps_are_measured_within_epochs_and_training_is_the_same(tmp_path):
    """Two epochs of three steps, measured after steps 2 and 4 and at the end."""
    stage = {"metrics": ["cross_entropy"], "student": {"model": "dropping"}}
    models = {"dropping": {"type": "ToyMLP", "params": {"dropout": 0.5}}}
    by_step = {**stage, "evaluate": {"every": 2, "unit": "steps"}}
    result, events = ran(tmp_path / "steps", by_step, models=models)
    plain, _ = ran(tmp_path / "plain", stage, models=models)
    assert [(e.position.epoch, e.position.step) for e in events.evaluations] == [(0, 2), (1, 4)]
    assert [list(e.metrics) for e in events.epochs] == [[], ["cross_entropy"]]
    assert equal(written(result, "last"), written(plain, "last"))
    once, _ = ran(
        tmp_path / "once", {**stage, "epochs": 1, "evaluate": by_step["evaluate"]}, models=models
    )
    values = [e.metrics["cross_entropy"] for e in events.evaluations]
    values.append(events.epochs[-1].metrics["cross_entropy"])
    assert len(set(values)) == 3
    assert values[2] == pytest.approx(cross_entropy_on_val(result.student()))
    best = result.student(weights="best")
    assert cross_entropy_on_val(best) == pytest.approx(min(values))
    assert once.stages[0].validation["cross_entropy"] not in values


AVERAGED = {"ema": {"decay": 0.5}, "metrics": ["cross_entropy"]}


def test_what_is_kept_of_a_stage_is_what_the_next_one_begins_with(tmp_path):
    still = {"type": "SGD", "params": {"lr": 0.0}}
    first = {**AVERAGED, "scheduler": DIVERGING, "epochs": 4}
    later = {"name": "later", "epochs": 1, "optimizer": still, "scheduler": None, "ema": None}
    for keep in ("last", "best", "ema"):
        result, _ = ran(tmp_path / keep, {**first, "keep": keep}, {**later, "keep": "last"})
        weights = {name: written(result, name) for name in ("last", "best", "ema")}
        assert not equal(weights["last"], weights["best"])
        assert not equal(weights["last"], weights["ema"])
        assert not equal(weights["best"], weights["ema"])
        assert equal(written(result, "last", "later"), weights[keep])
        assert equal(dict(result.student("stage0").state_dict()), weights[keep])


def test_the_best_by_the_average_is_the_average(tmp_path):
    stage = {**AVERAGED, "scheduler": DIVERGING, "epochs": 5, "best_by": "ema.cross_entropy"}
    result, events = ran(tmp_path, stage)
    values = [event.metrics["ema.cross_entropy"] for event in events.epochs]
    best = values.index(min(values))
    assert 0 < best < 4
    assert result.stages[0].best_epoch == best + 1
    found = cross_entropy_on_val(result.student(weights="best"))
    assert found == pytest.approx(values[best])
    assert found != pytest.approx(events.epochs[best].metrics["cross_entropy"])
    shorter, _ = ran(tmp_path / "shorter", {**stage, "epochs": best + 1})
    assert equal(written(result, "best"), written(shorter, "ema"))
    assert equal(written(shorter, "best"), written(shorter, "ema"))
    assert not equal(written(shorter, "best"), written(shorter, "last"))


def test_the_average_that_a_run_writes_is_that_of_the_steps_by_hand(tmp_path):
    """One batch an epoch: three steps of plain gradient descent."""
    data = {"train": "train", "validate": "val", "batch_size": 20}
    sgd = {"type": "SGD", "params": {"lr": 0.1}}
    result, _ = ran(tmp_path, {**AVERAGED, "data": data, "optimizer": sgd, "epochs": 3})
    train = ToyData(20)
    start, _ = ran(
        tmp_path / "start",
        {"data": data, "epochs": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}},
    )
    model = start.student()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model.zero_grad()
        functional.cross_entropy(model(train.inputs), torch.tensor(train.labels)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        average = {n: 0.5 * average[n] + 0.5 * v for n, v in model.state_dict().items()}
    for name, value in written(result, "ema").items():
        torch.testing.assert_close(value, average[name])


def test_a_metric_of_a_stage_that_compares_with_a_teacher_it_has_not_is_a_fault(tmp_path, place):
    given = {"metrics": ["accuracy", {"type": "agreement", "params": {"teacher": "wide"}}]}
    experiment = toy_experiment(tmp_path, given)
    with pytest.raises(ConfigError) as caught:
        check(experiment, toy_registry())
    (fault,) = caught.value.faults
    assert fault.message == "stage 'stage0' has no teacher 'wide' to compare with"
    assert fault.path == "stages.stage0.metrics[1]"
    text = (tmp_path / "toy.yaml").read_text()
    assert fault.location.line == int(place(text, "- type: agreement").split(":")[0])


def test_the_test_leaves_out_what_compares_with_a_teacher_where_there_is_none(tmp_path):
    teaching = {"name": "taught", "teacher": {"model": "wide"}}
    test = {"dataset": "val", "metrics": ["accuracy", "agreement"]}
    result, _ = ran(tmp_path, {}, teaching, test=test)
    plain, taught = result.stages
    assert list(plain.test) == ["accuracy"]
    assert list(taught.test) == ["accuracy", "agreement"]
    teacher = Builder(result.experiment, toy_registry()).model("wide", 0).eval()
    student = result.student("taught").eval()
    with torch.no_grad():
        same = student(VAL.inputs).argmax(1) == teacher(VAL.inputs).argmax(1)
    assert taught.test["agreement"] == pytest.approx(same.float().mean().item())
