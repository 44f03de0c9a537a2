"""What a stage measures, and which measurement is the best."""

import math

import pytest
import torch

from distill import ConfigError
from distill.testing import toy_experiment, toy_registry
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


def test_a_metric_may_have_a_name_with_a_slash(tmp_path):
    stage = {"metrics": [{"type": "accuracy", "name": "top/1"}], "best_by": "top/1"}
    measured = measuring(tmp_path, **stage)
    assert measured.improves(Best(), measured.validate())


def test_the_first_metric_decides_though_its_name_has_a_slash(tmp_path):
    measured = measuring(tmp_path, metrics=[{"type": "accuracy", "name": "top/1"}])
    assert measured.improves(Best(), measured.validate())


def test_nothing_is_best_where_nothing_is_measured(tmp_path):
    assert not measuring(tmp_path, metrics=[]).improves(Best(), {"accuracy": 1.0})
    assert not measuring(tmp_path).improves(Best(), {})


def test_what_decides_has_to_be_measured(tmp_path):
    decided = measuring(tmp_path, best_by="accuracy/part")
    with pytest.raises(ConfigError, match=r"'accuracy/part' is not among what is measured: acc"):
        decided.improves(Best(), {"accuracy": 1.0})


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
