"""Models that train beside the student (mutual learning): auxiliary modules that are models.

Over processes, sharded and through a kill they are tested in ``test_recipes.py``.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import distill
from distill import Observer
from distill.errors import ConfigError, DataError, UsageError
from distill.experiment_check import check
from distill.model_evaluation import evaluate
from distill.testing import ToyData, toy_experiment, toy_registry
from distill.trained import Choice, trained_model

CE = {"type": "CrossEntropyLoss"}
PEER = {"model": "other", "inputs": {"inputs": "inputs"}}
MUTUAL = {
    "ce": CE,
    "from_peer": {"type": "Towards", "inputs": {"student": "student", "teacher": "peer"}},
    "peer_ce": {**CE, "inputs": {"student": "peer", "targets": "targets"}},
    "to_peer": {"type": "Towards", "inputs": {"student": "peer", "teacher": "student"}},
}
MODELS = {
    "mlp": {"type": "ToyMLP"},
    "other": {"type": "ToyMLP", "seed": 1},
    "third": {"type": "ToyMLP", "seed": 2},
}
ADAM = {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1}, "no_decay": ["bias"]}


class Towards(nn.Module):
    """How far the student's classes are from the teacher's, which gets no gradient."""

    def forward(self, student, teacher):
        given = teacher.detach().softmax(1)
        return nn.functional.kl_div(student.log_softmax(1), given, reduction="batchmean")


class Killed(Exception):
    pass


class Stop(Observer):
    """Ends the process after the second epoch of a stage, before it is saved."""

    def epoch_end(self, event):
        if event.position.epoch == 2 and STOPPING:
            raise Killed


STOPPING: list[bool] = []
REGISTRY = toy_registry(losses={"Towards": Towards}, observers={"Stop": Stop})


def mutual(folder, *more, models=MODELS, **keys):
    stage = {"name": "mutual", "auxiliary": {"peer": PEER}, "criterion": MUTUAL, **keys}
    stage.setdefault("optimizer", ADAM)
    return toy_experiment(folder, stage, *more, models=models, test={"dataset": "val"})


def run(experiment, folder):
    return distill.run(experiment, registry=REGISTRY, runs=folder)


def weights(folder, name):
    return load_file(folder / "toy" / f"{name}.safetensors")


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def fault_of(folder, *more, data=False, **keys):
    with pytest.raises(ConfigError) as error:
        check(mutual(folder, *more, **keys), REGISTRY, data=data)
    (fault,) = error.value.faults
    return fault


class Flat(nn.Linear):
    """A model that starts from given weights."""

    def __init__(self, start: float):
        super().__init__(4, 3, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.linspace(-start, start, 12).view(3, 4))


def test_two_models_learn_from_each_other_as_the_formula_says(tmp_path):
    registry = toy_registry(losses={"Towards": Towards}, models={"Flat": Flat})
    models = {
        "mlp": {"type": "Flat", "params": {"start": 1.0}},
        "other": {"type": "Flat", "params": {"start": 0.3}},
    }
    experiment = mutual(
        tmp_path,
        models=models,
        epochs=3,
        data={"train": "train", "batch_size": 20},
        auxiliary={"peer": {"model": "other", "inputs": {"input": "inputs"}}},
        optimizer={"type": "SGD", "params": {"lr": 0.5}},
    )
    distill.run(experiment, registry=registry, runs=tmp_path)
    data = ToyData(20)
    labels = torch.tensor(data.labels)
    pair = [Flat(1.0).weight.detach(), Flat(0.3).weight.detach()]
    for _ in range(3):
        logits = [data.inputs @ weight.T for weight in pair]
        softened = [one.softmax(1) for one in logits]
        wanted = nn.functional.one_hot(labels, 3).float()
        # The gradient of CE + KL(other || own) by the own logits is 2 p - wanted - p of the other.
        for this, that in ((0, 1), (1, 0)):
            slope = (2 * softened[this] - wanted - softened[that]) / 20
            pair[this] = pair[this] - 0.5 * slope.T @ data.inputs
    for name, expected in zip(("last", "other.last"), pair, strict=True):
        found = weights(tmp_path, f"mutual/{name}")["weight"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_peer_is_measured_beside_the_student(tmp_path):
    result = run(mutual(tmp_path), tmp_path)
    (stage,) = result.stages
    assert stage.validation.keys() == stage.test.keys() == {"accuracy", "peer.accuracy"}
    assert "peer.accuracy" in result.table


def test_a_written_peer_is_what_was_measured(tmp_path):
    experiment = mutual(tmp_path, keep="best")
    (stage,) = run(experiment, tmp_path).stages
    for name in ("peer", "other"):
        model, origin = trained_model(experiment, REGISTRY, Choice(name), tmp_path / "toy")
        assert origin == "model other, last of stage mutual, seed 0"
        assert evaluate(experiment, REGISTRY, model)[1]["accuracy"] == stage.test["peer.accuracy"]


def test_of_a_peer_there_are_no_best_weights(tmp_path):
    experiment = mutual(tmp_path, keep="best")
    run(experiment, tmp_path)
    with pytest.raises(UsageError, match="only the last weights, not 'best'"):
        trained_model(experiment, REGISTRY, Choice("peer", weights="best"), tmp_path / "toy")


def test_a_later_stage_is_taught_by_the_trained_peer_and_may_train_it_on(tmp_path):
    kd = {
        "name": "kd",
        "auxiliary": None,
        "teacher": {"model": "other"},
        "student": {"model": "third"},
        "criterion": {"ce": CE, "kd": {"type": "Towards"}},
    }
    on = {
        "name": "on",
        "teacher": None,
        "student": {"model": "other"},
        "criterion": {"ce": CE},
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
    }
    stages = run(mutual(tmp_path, kd, on), tmp_path).stages
    assert stages[1].teachers["teacher"]["accuracy"] == stages[0].validation["peer.accuracy"]
    assert distance(weights(tmp_path, "on/last"), weights(tmp_path, "mutual/other.last")) == 0


def test_a_stage_that_inherits_a_peer_trains_it_on(tmp_path):
    on = {"name": "on", "optimizer": {"type": "SGD", "params": {"lr": 0.0}}}
    again = {
        "name": "again",
        "auxiliary": {"mate": {"reuse": "peer"}},
        "criterion": {"ce": CE, "theirs": {**CE, "inputs": {"student": "mate"}}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    run(mutual(tmp_path, on, again), tmp_path)
    after = weights(tmp_path, "mutual/other.last")
    assert distance(weights(tmp_path, "on/other.last"), after) == 0
    assert distance(weights(tmp_path, "again/other.last"), after) > 0


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on = {"name": "on", "epochs": 1}
    run(mutual(whole, on, epochs=3), whole)
    text = mutual(parts, on, epochs=3).document.file
    experiment = distill.load(text, ["observers=[{type: Stop}]"])
    STOPPING.append(True)
    with pytest.raises(Killed):
        run(experiment, parts)
    STOPPING.clear()
    run(experiment, parts)
    for name in ("mutual/last", "mutual/other.last", "on/last", "on/other.last"):
        assert distance(weights(whole, name), weights(parts, name)) == 0, name


def test_equal_architectures_start_equal_unless_seeded_apart(tmp_path):
    still = {"type": "SGD", "params": {"lr": 0.0}}
    run(mutual(tmp_path / "apart", optimizer=still), tmp_path / "apart")
    alike = {"mlp": {"type": "ToyMLP"}, "other": {"type": "ToyMLP"}}
    run(mutual(tmp_path / "alike", models=alike, optimizer=still), tmp_path / "alike")
    for folder, same in ((tmp_path / "apart", False), (tmp_path / "alike", True)):
        found = distance(weights(folder, "mutual/last"), weights(folder, "mutual/other.last"))
        assert (found == 0) is same


def test_a_peer_starts_from_its_checkpoint(tmp_path):
    run(mutual(tmp_path / "first"), tmp_path / "first")
    file = tmp_path / "first/toy/mutual/other.last.safetensors"
    models = {**MODELS, "other": {**MODELS["other"], "checkpoint": str(file)}}
    still = {"type": "SGD", "params": {"lr": 0.0}}
    run(mutual(tmp_path, models=models, optimizer=still), tmp_path)
    assert distance(weights(tmp_path, "mutual/other.last"), load_file(file)) == 0


def test_groups_and_freezing_find_a_peer_by_its_name(tmp_path):
    groups = {"groups": [{"match": ["peer"], "params": {"lr": 0.0}}]}
    sgd = {"type": "SGD", "params": {"lr": 0.1}, **groups}
    run(mutual(tmp_path / "groups", optimizer=sgd), tmp_path / "groups")
    frozen = {"freeze": ["peer.body"], "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    run(mutual(tmp_path / "frozen", **frozen), tmp_path / "frozen")
    start = trained_model(mutual(tmp_path), REGISTRY, Choice("other"), None)[0].state_dict()
    assert distance(weights(tmp_path / "groups", "mutual/other.last"), start) == 0
    after = weights(tmp_path / "frozen", "mutual/other.last")
    assert torch.equal(after["body.0.weight"], start["body.0.weight"])
    assert not torch.equal(after["head.weight"], start["head.weight"])


@pytest.mark.parametrize("feature", ["peer.body", "peer.head:input", "peer.body.0@-1"])
def test_features_of_a_peer_are_captured(tmp_path, feature):
    fed = {"input": feature.replace("peer", "student"), "target": feature}
    terms = {**MUTUAL, "distance": {"type": "L1Loss", "inputs": fed}}
    losses = []

    class Watch(Observer):
        def epoch_end(self, event):
            losses.append(event.losses["distance"])

    registry = toy_registry(losses={"Towards": Towards}, observers={"Watch": Watch})
    file = mutual(tmp_path, criterion=terms, epochs=1).document.file
    experiment = distill.load(file, ["observers=[Watch]"])
    distill.run(experiment, registry=registry, runs=tmp_path)
    assert losses[0] > 0


def test_what_no_term_asks_of_a_peer_is_left_as_it_is(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "peer.body", "target": "student.body"}}
    trainable = []

    class Watch(Observer):
        def stage_start(self, event):
            trainable.append(event.trainable)

    registry = toy_registry(observers={"Watch": Watch})
    file = mutual(tmp_path, criterion={"ce": CE, "hint": hint}).document.file
    experiment = distill.load(file, ["observers=[Watch]"])
    distill.run(experiment, registry=registry, runs=tmp_path)
    assert trainable == [(40 + 27) + 40]  # body and head of the student, the body of the peer
    start = trained_model(experiment, REGISTRY, Choice("other"), None)[0].state_dict()
    after = weights(tmp_path, "mutual/other.last")
    assert torch.equal(after["head.weight"], start["head.weight"])  # no weight decay either
    assert not torch.equal(after["body.0.weight"], start["body.0.weight"])


def test_an_unknown_model_is_answered_with_the_nearest(tmp_path):
    peer = {"model": "othr", "inputs": {"inputs": "inputs"}}
    fault = fault_of(tmp_path, auxiliary={"peer": peer})
    assert fault.path == "stages.mutual.auxiliary.peer.model"
    assert fault.message == "there is no model 'othr' in this file; did you mean other or third?"


def test_an_input_that_is_not_wired_is_told_by_its_name(tmp_path):
    fault = fault_of(tmp_path, auxiliary={"peer": {"model": "other"}})
    assert fault.path == "stages.mutual.auxiliary.peer"
    assert fault.message == "model 'other' needs the input 'inputs'; wire it: {inputs: inputs}"


@pytest.mark.parametrize(
    ("peer", "keys", "role"),
    [
        ("mlp", {}, "the student"),
        ("third", {"teacher": {"model": "third"}}, "the teacher"),
    ],
)
def test_a_model_has_one_role_in_a_stage(tmp_path, peer, keys, role):
    fault = fault_of(tmp_path, auxiliary={"peer": {**PEER, "model": peer}}, **keys)
    assert fault.path == "stages.mutual.auxiliary.peer.model"
    assert fault.message.startswith(f"'{peer}' is {role} of stage 'mutual' already")


def test_two_peers_are_two_models(tmp_path):
    fault = fault_of(tmp_path, auxiliary={"peer": PEER, "mate": PEER})
    assert "'other' is the module 'peer' of stage 'mutual' already" in fault.message


def test_an_inherited_peer_that_is_to_teach_is_told_with_what_to_do(tmp_path):
    kd = {
        "name": "kd",
        "teacher": {"model": "other"},
        "student": {"model": "third"},
        "criterion": {"kd": {"type": "Towards"}},
    }
    fault = fault_of(tmp_path, kd)
    assert fault.path == "stages.mutual.auxiliary.peer.model"
    assert "'other' is the teacher of stage 'kd' already" in fault.message
    assert "leave this one out of the stage's 'auxiliary'" in fault.message


@pytest.mark.parametrize(
    ("more", "key", "words"),
    [
        ({"frozen": True}, ".frozen", "a model that stays as it is teaches"),
        ({"params": {"hidden": 3}}, ".params", "'model' takes no params"),
        ({"type": "Linear"}, "", "give one of 'type'"),
        ({"inputs": {"inptus": "inputs"}}, ".inputs.inptus", "did you mean inputs?"),
        ({"inputs": {"inputs": "nowhere"}}, ".inputs.inputs", "stage 'mutual' has no 'nowhere'"),
    ],
)
def test_what_does_not_go_with_a_peer_is_told_at_its_place(tmp_path, more, key, words):
    fault = fault_of(tmp_path, auxiliary={"peer": {**PEER, **more}})
    assert fault.path == f"stages.mutual.auxiliary.peer{key}"
    assert words in fault.message


def test_a_peer_that_no_term_trains_is_refused_before_anything_trains(tmp_path):
    terms = {name: MUTUAL[name] for name in ("ce", "from_peer")}
    fault = fault_of(tmp_path, criterion=terms, data=True)
    assert fault.path == "stages.mutual.auxiliary.peer"
    assert "no term trains the model 'other'" in fault.message


def test_a_peer_of_other_classes_than_the_data_is_refused(tmp_path):
    models = {**MODELS, "other": {"type": "ToyMLP", "params": {"classes": 5}}}
    terms = {name: MUTUAL[name] for name in ("ce", "peer_ce")}
    with pytest.raises(DataError, match="model 'other' has 5 outputs"):
        check(mutual(tmp_path, models=models, criterion=terms), REGISTRY, data=True)


def test_a_peer_that_fails_on_its_input_is_told_at_its_place(tmp_path):
    models = {**MODELS, "other": {"type": "ToyMLP", "params": {"features": 5}}}
    fault = fault_of(tmp_path, models=models, data=True)
    assert fault.path == "stages.mutual.auxiliary.peer"
    assert "ToyMLP failed on inputs=inputs (2, 4)" in fault.message
