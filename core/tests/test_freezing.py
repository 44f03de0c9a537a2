"""What of a stage stays as it is: parameters, and running statistics where the file says so."""

import copy

import pytest
import torch
from torch import nn

from distill import ConfigError, DistillError, check
from distill.testing import ToyConvNet, ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.seed_run import SeedRun
from distill.training.selection import select_statistics
from distill.training.trainer import train_stage

CPU = torch.device("cpu")
IMAGES = {
    "train": {"type": "ToyData", "params": {"size": 20, "shape": [1, 4, 4]}},
    "val": {"type": "ToyData", "params": {"size": 12, "shape": [1, 4, 4], "seed": 1}},
}
DECAY = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class Deep(nn.Module):
    """Two normalized convolutions, the second without parameters in its normalization."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs):
        features = self.second(self.first(inputs).relu()).relu()
        return self.head(self.plain(features.mean((2, 3))))


class Bridge(nn.Module):
    """A module whose output depends on its mode, with everything that could move."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.modes = []

    def forward(self, features):
        self.modes.append((self.training, self.norm.training))
        return self.norm(self.layer(features))


REGISTRY = toy_registry(models={"Deep": Deep}, auxiliary_modules={"Bridge": Bridge})
MODELS = {"net": {"type": "Deep"}, "mlp": {"type": "ToyMLP"}, "wide": {"type": "ToyMLP"}}
SETTINGS = {"datasets": IMAGES, "models": MODELS}
SPARE = {  # for what is left to train where all of the student is frozen
    "auxiliary": {
        "spare": {
            "type": "Linear",
            "params": {"in_features": 3, "out_features": 3},
            "inputs": {"input": "student"},
        }
    },
    "criterion": {"ce": {"type": "CrossEntropyLoss", "inputs": {"student": "spare"}}},
}
STUDENT = {"student": {"model": "net"}, "optimizer": DECAY}


def seed_run(folder, *stages, told=None, **keys):
    experiment = toy_experiment(folder, *stages, **keys)
    builder = Builder(experiment, REGISTRY)
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    tell = (lambda name, event: told.append((name, event))) if told is not None else _nobody
    return SeedRun(builder, 0, CPU, folder / "run", tell, models, sources)


def _nobody(name, event):
    pass


def states(module):
    return copy.deepcopy(module.state_dict())


def stayed(module, before):
    return {name for name, v in module.state_dict().items() if torch.equal(v, before[name])}


def trained(folder, freeze, **more):
    """Train a student of BatchNorm layers; return what of it has stayed as it was."""
    ready = seed_run(folder, {**STUDENT, "freeze": freeze, **more}, **SETTINGS)
    before = states(ready.models["net"])
    train_stage(ready, 0)
    assert all(p.requires_grad for p in ready.models["net"].parameters())
    return stayed(ready.models["net"], before)


def named(prefix, *names):
    return {f"{prefix}.{name}" for name in names}


@pytest.mark.parametrize(
    ("entry", "parameters"),
    [
        ("student.first", named("first", "0.weight", "0.bias", "1.weight", "1.bias")),
        ("student.first.-1", named("first.1", "weight", "bias")),
        ("BatchNorm2d", named("first.1", "weight", "bias") | named("second.1", "weight", "bias")),
        ("student.*.1.bias", {"first.1.bias", "second.1.bias"}),
        ("bias", {f"{n}.bias" for n in ("first.0", "first.1", "second.0", "second.1", "head")}),
        ("norm", named("first.1", "weight", "bias") | named("second.1", "weight", "bias")),
        ("student.head.weight", {"head.weight"}),
    ],
)
def test_parameters_stay_by_path_class_pattern_and_word_and_statistics_move(
    tmp_path, entry, parameters
):
    """Weight decay moves whatever the optimizer knows of."""
    assert trained(tmp_path, [entry]) == parameters


def statistics(*layers):
    return {f"{layer}.{name}" for layer in layers for name in STATISTICS}


@pytest.mark.parametrize(
    ("entry", "parameters", "layers"),
    [
        (
            "student.first",
            named("first", "0.weight", "0.bias", "1.weight", "1.bias"),
            ["first.1"],
        ),
        (
            "BatchNorm2d",
            named("first.1", "weight", "bias") | named("second.1", "weight", "bias"),
            ["first.1", "second.1"],
        ),
        pytest.param(
            "student.second.*.weight",
            {"second.0.weight", "second.1.weight"},
            ["second.1"],
        ),
        ("student.first.1.bias", {"first.1.bias"}, ["first.1"]),
        ("*.1.bias", {"first.1.bias", "second.1.bias"}, ["first.1", "second.1"]),
        ("student", {n for n, _ in Deep().named_parameters()}, ["first.1", "second.1", "plain"]),
    ],
)
def test_with_statistics_those_stay_too(tmp_path, entry, parameters, layers):
    found = trained(tmp_path, [{"match": [entry], "statistics": True}], **SPARE)
    assert found == parameters | statistics(*layers)


def test_entries_with_and_without_statistics_stand_side_by_side(tmp_path):
    freeze = [
        {"match": ["student.first"], "statistics": True},
        {"match": ["student.second"]},
        {"match": ["student.head"], "statistics": False},
    ]
    params = {n for n, _ in Deep().named_parameters()} - {"plain.weight"}
    assert trained(tmp_path, freeze, **SPARE) == params | statistics("first.1")


def test_what_was_frozen_moves_in_the_next_stage(tmp_path):
    freeze = [{"match": ["student.first"], "statistics": True}]
    ready = seed_run(tmp_path, {**STUDENT, "freeze": freeze}, {"freeze": []}, **SETTINGS)
    train_stage(ready, 0)
    before = states(ready.models["net"])
    assert all(module.training for module in ready.models["net"].modules())
    train_stage(ready, 1)
    assert stayed(ready.models["net"], before) == set()


def test_what_is_frozen_is_thawed_after_an_error_too(tmp_path):
    freeze = ["student.first", "student.frist"]
    ready = seed_run(tmp_path, {**STUDENT, "freeze": freeze}, **SETTINGS)
    with pytest.raises(ConfigError):
        train_stage(ready, 0)
    assert all(p.requires_grad for p in ready.models["net"].parameters())


def test_held_statistics_are_used_and_stay_after_an_evaluation_in_between(tmp_path):
    stage = {
        "freeze": [{"match": ["student.first"], "statistics": True}],
        "evaluate": {"every": 1, "unit": "steps"},
    }
    ready = seed_run(tmp_path, {**STUDENT, **stage}, **SETTINGS)
    model = ready.models["net"]
    before, modes = states(model), []
    # Until then it is rehearsed, at first without knowing what is frozen.
    ready.tell = lambda name, _: modes.clear() if name == "stage_start" else None
    model.first[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    train_stage(ready, 0)
    assert statistics("first.1") <= stayed(model, before)
    assert len(modes) > 6
    assert not any(modes)


def test_the_frozen_are_counted_in_the_notes(tmp_path):
    told = []
    ready = seed_run(tmp_path, {**STUDENT, "freeze": ["student.head"]}, told=told, **SETTINGS)
    train_stage(ready, 0)
    (start,) = [event for name, event in told if name == "stage_start"]
    assert "15 parameters are frozen" in start.notes
    assert start.trainable == start.parameters - 15


def bridged(**module):
    bridge = {"type": "Bridge", "params": {"width": 8}, "inputs": {"features": "student.body"}}
    return {
        "student": {"model": "mlp"},
        "teacher": {"model": "twin"},
        "auxiliary": {"bridge": {**bridge, **module}},
        "criterion": {
            "hint": {"type": "MSELoss", "inputs": {"input": "bridge", "target": "teacher.body"}}
        },
        "optimizer": DECAY,
    }


TWINS = {"models": {"mlp": {"type": "ToyMLP"}, "twin": {"type": "ToyMLP", "seed": 1}}}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_auxiliary_module_stays_in_eval_mode_and_lets_gradients_pass(tmp_path, frozen):
    ready = seed_run(tmp_path, bridged(frozen=frozen), **TWINS)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    assembly.distiller.release()
    bridge, model = assembly.auxiliary["bridge"], ready.models["mlp"]
    before = states(bridge), states(model.body)
    rehearsing = 2  # before it is known to be frozen
    train_stage(ready, 0)
    still = stayed(bridge, before[0])
    assert (still == set(before[0])) is frozen
    assert (still == set()) is not frozen
    assert stayed(model.body, before[1]) == set()
    assert set(bridge.modes[rehearsing:]) == {(not frozen, not frozen)}
    assert bridge.training
    assert bridge.norm.training
    assert all(p.requires_grad for p in bridge.parameters())


def test_a_module_frozen_in_one_stage_trains_in_the_next(tmp_path):
    again = {"auxiliary": {"bridge": {"reuse": "bridge"}}}
    ready = seed_run(tmp_path, bridged(frozen=True), again, **TWINS)
    train_stage(ready, 0)
    bridge = ready.parts.modules["auxiliary_modules", "stage0", "bridge"]
    before = states(bridge)
    train_stage(ready, 1)
    assert stayed(bridge, before) == set()


def test_an_auxiliary_module_and_its_statistics_may_be_frozen_by_name(tmp_path):
    freeze = [{"match": ["bridge.norm"], "statistics": True}]
    ready = seed_run(tmp_path, {**bridged(), "freeze": freeze}, **TWINS)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    assembly.distiller.release()
    bridge = assembly.auxiliary["bridge"]
    before = states(bridge)
    train_stage(ready, 0)
    assert stayed(bridge, before) == {f"norm.{n}" for n in (*STATISTICS, "weight", "bias")}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"match": ["student.head"], "statistics": True}, "'student.head' has no running"),
        ({"match": ["Linear"], "statistics": True}, "'Linear' has no running statistics"),
        ({"match": ["student.fist"], "statistics": True}, "Deep has no module 'fist'; did you"),
        ("teacher.body", "'teacher.body' is neither a module nor a class"),
    ],
)
def test_an_entry_that_means_nothing_is_told_at_its_place(tmp_path, entry, message):
    with pytest.raises(ConfigError) as caught:
        check(
            toy_experiment(tmp_path, {**STUDENT, "freeze": ["bias", entry]}, **SETTINGS), REGISTRY
        )
    (fault,) = caught.value.faults
    where = ".match[0]" if isinstance(entry, dict) else ""
    assert fault.path == f"stages.stage0.freeze[1]{where}"
    assert message in fault.message


def layers(entry, **trained):
    names = {m: f"{o}.{n}" for o, root in trained.items() for n, m in root.named_modules()}
    return {names[module] for module in select_statistics(entry, trained)}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("student", {"first.1", "second.1", "plain"}),
        ("student.second", {"second.1"}),
        ("student.second.-1", {"second.1"}),
        ("BatchNorm2d", {"first.1", "second.1"}),
        ("norm", {"first.1", "second.1"}),
        ("bias", {"first.1", "second.1"}),
        ("*.first.*", {"first.1"}),
        ("student.first.*", {"first.1"}),
        ("Deep", {"first.1", "second.1"}),
    ],
)
def test_statistics_are_those_of_the_layers_an_entry_means(entry, expected):
    found = layers(entry, student=Deep(), other=ToyMLP())
    assert found == {f"student.{name}" for name in expected}


@pytest.mark.parametrize("entry", ["BatchNorm1d", "student.plain"])
def test_a_layer_without_parameters_has_statistics_too(entry):
    assert layers(entry, student=Deep()) == {"student.plain"}


def test_a_layer_that_tracks_nothing_has_no_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(DistillError, match="'student' has no running statistics"):
        select_statistics("student", {"student": model})
    assert layers("norm", student=ToyConvNet()) == {"student.norm"}
