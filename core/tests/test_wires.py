"""From the references of a stage to the values that its modules get."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import Batch, ConfigError, check
from distill.testing import toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.checkpoint import load_state
from distill.training.seed_run import SeedRun
from distill.training.stage import roles_in_force
from distill.training.trainer import train_stage

CPU = torch.device("cpu")
HINT = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "teacher.body"}}


class Spy(nn.Module):
    """A loss that keeps what it is given."""

    def forward(self, **given):
        self.given = given
        tensors = [v for value in given.values() for v in _tensors(value)]
        return sum(tensor.float().mean() for tensor in tensors)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in _tensors(item)]


class Deep(nn.Module):
    """Rows of layers, a layer called again and again, a buffer, and a layer with two outputs."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        )
        self.again = nn.Tanh()
        self.pair = Pair()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, inputs):
        features = self.rows(inputs)
        for _ in range(3):
            features = self.again(features * self.scale)
        return self.head(self.norm(self.pair({"x": features, "y": [features, -features]})["sum"]))


class Pair(nn.Module):
    def forward(self, given):
        return {"sum": given["x"] + given["y"][1], "parts": (given["x"], given["y"][0])}


class Stacked(nn.Module):
    """An auxiliary module of several features."""

    def forward(self, features, scale=None):
        assert isinstance(features, list)
        stacked = torch.cat(features, 1)
        return stacked if scale is None else stacked * scale.mean()


REGISTRY = toy_registry(
    losses={"Spy": Spy}, models={"Deep": Deep}, auxiliary_modules={"Stacked": Stacked}
)
MODELS = {
    "deep": {"type": "Deep"},
    "big": {"type": "Deep", "seed": 1},
    "mlp": {"type": "ToyMLP"},
    "wide": {"type": "ToyMLP", "params": {"hidden": 12}},
}
DEEP = {"student": {"model": "deep"}, "teacher": {"model": "big"}}
TAUGHT = {"student": {"model": "mlp"}, "teacher": {"model": "wide"}}


def seed_run(folder, *stages, told=None):
    experiment = toy_experiment(folder, *stages, models=MODELS)
    builder = Builder(experiment, REGISTRY)
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    tell = (lambda name, event: told.append((name, event))) if told is not None else _nobody
    return SeedRun(builder, 0, CPU, folder / "run", tell, models, sources)


def _nobody(name, event):
    pass


def batch():
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    return Batch(inputs, torch.arange(6) % 3, torch.arange(6))


def spied(folder, inputs, **stage):
    """What a loss wired so is given, with the models in eval mode, after a step backwards."""
    spy = {"type": "Spy", "inputs": inputs}
    criterion = {"ce": {"type": "CrossEntropyLoss", "weight": 0.0}, "spy": spy}
    ready = seed_run(folder, {**DEEP, **stage, "criterion": criterion})
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    student, teacher = (assembly.roles[role] for role in ("student", "teacher"))
    with roles_in_force(assembly):
        student.eval()
        assembly.distiller(batch())["total"].backward()
    return assembly.terms["spy"].given, student.eval(), teacher.eval()


def faults_of(folder, stage, *, data=False):
    with pytest.raises(ConfigError) as caught:
        check(toy_experiment(folder, stage, models=MODELS), REGISTRY, data=data)
    return [(fault.path, fault.message) for fault in caught.value.faults]


def test_several_references_give_a_list_in_their_order(tmp_path):
    refs = ["student.rows.1", "student.rows.0", "inputs", "teacher.rows.1"]
    given, student, teacher = spied(tmp_path, {"features": refs, "alone": "student.rows.0"})
    first = student.rows[0](batch().inputs)
    expected = [student.rows[1](first), first, batch().inputs, teacher.rows(batch().inputs)]
    assert isinstance(given["features"], list)
    for found, right in zip(given["features"], expected, strict=True):
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(given["alone"], first)


def test_a_list_of_one_is_a_list(tmp_path):
    given, *_ = spied(tmp_path, {"features": ["student.rows"]})
    assert [tensor.shape for tensor in given["features"]] == [(6, 6)]


def test_auxiliary_modules_take_lists_too_and_stand_in_lists(tmp_path):
    stacked = {
        "type": "Stacked",
        "inputs": {"features": ["student.rows.0", "student.rows.1"], "scale": "teacher.scale"},
    }
    auxiliary = {"stacked": stacked, "once": {**stacked, "inputs": {"features": ["stacked"]}}}
    given, student, _ = spied(tmp_path, {"f": ["once", "student"]}, auxiliary=auxiliary)
    first = student.rows[0](batch().inputs)
    expected = torch.cat([first, student.rows[1](first)], 1) * 2
    torch.testing.assert_close(given["f"][0], expected)


def again(model, inputs):
    features = model.rows(inputs)
    for _ in range(3):
        features = (2 * features).tanh()
    return features


def fed(model, inputs):
    features = again(model, inputs)
    return {"x": features, "y": [features, -features]}


@pytest.mark.parametrize(
    ("reference", "right"),
    [
        ("student.rows.-1", lambda m, x: m.rows(x)),
        ("student.rows.-2.0", lambda m, x: m.rows[0][0](x)),
        ("student.-1:input", lambda m, x: m.norm(m.pair(fed(m, x))["sum"])),
        ("student.again@0", lambda m, x: (2 * m.rows(x)).tanh()),
        ("student.again@0:input", lambda m, x: 2 * m.rows(x)),
        ("student.again@-1", again),
        ("student.again@2", again),
        ("student.again@-3", lambda m, x: (2 * m.rows(x)).tanh()),
        ("student.again@-1:input", lambda m, x: 2 * (2 * (2 * m.rows(x)).tanh()).tanh()),
        ("student.pair@0.sum", lambda m, x: m.pair(fed(m, x))["sum"]),
        ("student.pair.sum", lambda m, x: m.pair(fed(m, x))["sum"]),
        ("student.pair@0.parts.1", again),
        ("student.pair:input.y.1", lambda m, x: -again(m, x)),
        ("student:input", lambda m, x: x),
        ("student", lambda m, x: m(x)),
    ],
)
def test_a_reference_is_the_value_it_names(tmp_path, reference, right):
    given, student, _ = spied(tmp_path, {"value": reference})
    torch.testing.assert_close(given["value"], right(student, batch().inputs))


def test_parameters_and_buffers_are_values_and_gradients_reach_the_students_only(tmp_path):
    inputs = {
        "own": "student.head.weight",
        "negative": "student.rows.-1.0.bias",
        "theirs": "teacher.head.weight",
        "buffers": ["student.scale", "teacher.norm.running_var"],
    }
    given, student, teacher = spied(tmp_path, inputs)
    assert given["own"] is student.head.weight
    assert given["negative"] is student.rows[1][0].bias
    assert given["theirs"] is teacher.head.weight
    assert given["buffers"] == [student.scale, teacher.norm.running_var]
    torch.testing.assert_close(student.head.weight.grad, torch.full((3, 6), 1 / 18))
    assert teacher.head.weight.grad is None


def test_a_term_of_weights_trains_them(tmp_path):
    """As it is where a student's classifier is drawn to the teacher's."""
    near = {
        "type": "MSELoss",
        "weight": 50.0,
        "inputs": {"input": "student.head.weight", "target": "teacher.head.weight"},
    }
    stage = {**DEEP, "criterion": {"ce": {"type": "CrossEntropyLoss"}, "near": near}}
    ready = seed_run(
        tmp_path, {**stage, "epochs": 10, "optimizer": {"type": "SGD", "params": {"lr": 0.05}}}
    )
    student, teacher = ready.models["deep"], ready.models["big"]
    before = (student.head.weight - teacher.head.weight).abs().max().item()
    theirs = copy.deepcopy(teacher.state_dict())
    train_stage(ready, 0)
    assert (student.head.weight - teacher.head.weight).abs().max() < 0.2 * before
    assert all(torch.equal(v, theirs[n]) for n, v in teacher.state_dict().items())


def test_parameters_are_read_anew_in_every_step(tmp_path):
    ready = seed_run(
        tmp_path,
        {
            **DEEP,
            "criterion": {
                "spy": {"type": "Spy", "inputs": {"w": "student.head.weight", "o": "student"}}
            },
        },
    )
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    assembly.distiller(batch())
    assembly.roles["student"].head.weight = nn.Parameter(torch.zeros(3, 6))
    assembly.distiller(batch())
    assembly.distiller.release()
    assert not assembly.terms["spy"].given["w"].any()


AGAIN = {"again": {"module": "teacher.norm", "inputs": {"input": "student.rows"}}}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_teachers_module_is_called_again_in_the_teachers_mode_and_passes_gradients(
    tmp_path, mode
):
    target = {"type": "MSELoss", "inputs": {"input": "again", "target": "teacher.rows"}}
    stage = {
        "student": {"model": "deep"},
        "teacher": {"model": "big", "mode": mode},
        "auxiliary": AGAIN,
        "criterion": {"hint": target},
    }
    ready = seed_run(tmp_path, stage)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    student, teacher = assembly.roles["student"], assembly.roles["teacher"]
    with roles_in_force(assembly):
        assembly.distiller.train()
        assert teacher.norm.training is (mode == "train")
        assembly.distiller(batch())["total"].backward()
    assert teacher.norm.weight.grad is None
    by_hand = copy.deepcopy(student)
    by_hand.zero_grad()
    norm = copy.deepcopy(ready.builder.model("big", 0)).train(mode == "train").norm
    features = by_hand.rows(batch().inputs)
    F.mse_loss(norm(features), teacher.rows(batch().inputs).detach()).backward()
    for ours, theirs in zip(student.rows.parameters(), by_hand.rows.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_teachers_module_called_again_stays_as_it_was(tmp_path):
    target = {"type": "MSELoss", "inputs": {"input": "again", "target": "teacher.rows"}}
    ready = seed_run(tmp_path, {**DEEP, "auxiliary": AGAIN, "criterion": {"hint": target}})
    before = copy.deepcopy(ready.models["big"].state_dict())
    train_stage(ready, 0)
    assert all(torch.equal(v, before[n]) for n, v in ready.models["big"].state_dict().items())
    assert not ready.parts.modules.keys() - {("losses", "stage0", "hint")}


def test_a_teachers_module_keeps_its_mode_where_the_teacher_is_redesigned(tmp_path):
    redesign = {"type": "sequential", "params": {"modules": ["rows"]}}
    target = {"type": "MSELoss", "inputs": {"input": "again", "target": "teacher.rows"}}
    stage = {
        "student": {"model": "deep"},
        "teacher": {"model": "big", "redesign": redesign},
        "auxiliary": AGAIN,
        "criterion": {"hint": target},
    }
    ready = seed_run(tmp_path, stage)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    with roles_in_force(assembly):
        assembly.distiller.train()
        assert not assembly.roles["teacher"].norm.training


def test_a_students_module_is_called_again_with_the_same_weights_and_mode(tmp_path):
    own = {"own": {"module": "student.norm", "inputs": {"input": "student.rows"}}}
    given, student, _ = spied(tmp_path, {"value": "own"}, auxiliary=own)
    torch.testing.assert_close(given["value"], student.norm(student.rows(batch().inputs)))
    assert student.norm.weight.grad.abs().sum() > 0


def test_a_module_may_be_named_by_its_place_from_the_last(tmp_path):
    again = {"again": {"module": "teacher.rows.-1.0", "inputs": {"input": "student.rows.0"}}}
    given, student, teacher = spied(tmp_path, {"value": "again"}, auxiliary=again)
    expected = teacher.rows[1][0](student.rows[0](batch().inputs))
    torch.testing.assert_close(given["value"], expected)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("student.rows.7", "'student.rows.7': Deep has no module 'rows.7'; did you mean"),
        ("student.rows.-3", "Deep has no module 'rows.-3'"),
        ("teacher.roows.0", "Deep has no module 'roows.0'; did you mean rows.0"),
        ("student.haed@0", "Deep has no module 'haed'; did you mean head"),
        ("student.head.wieght:input", "Deep has no module 'head.wieght'"),
        ("again:input", "'again:input': name what feeds 'again' itself instead"),
        ("again@-1", "'again@-1': name what feeds 'again' itself instead"),
    ],
)
def test_a_reference_to_nothing_is_told_at_its_place(tmp_path, reference, message):
    for inputs, place in (
        ({"a": "student", "value": reference}, ".value"),
        ({"a": ["student", "targets", reference]}, ".a[2]"),
    ):
        criterion = {"ce": {"type": "CrossEntropyLoss"}, "spy": {"type": "Spy", "inputs": inputs}}
        stage = {**DEEP, "auxiliary": AGAIN, "criterion": criterion}
        ((path, text),) = faults_of(tmp_path, stage)
        assert path == f"stages.stage0.criterion.spy.inputs{place}"
        assert message in text


def test_a_reference_in_a_list_to_what_the_stage_has_not_is_told_at_its_place(tmp_path):
    spy = {"type": "Spy", "inputs": {"a": ["student", "teecher.body"]}}
    with pytest.raises(ConfigError) as caught:
        toy_experiment(tmp_path, {**TAUGHT, "criterion": {"spy": spy}}, models=MODELS)
    (fault,) = caught.value.faults
    assert fault.path == "stages.stage0.criterion.spy.inputs.a[1]"
    assert "has no 'teecher'; did you mean teacher" in fault.message


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("teacher", "'teacher' is no module of a model; write one of student.<module>, teacher.<"),
        ("inputs.x", "'inputs.x' is no module of a model"),
        ("other.head", "'other.head' is no module of a model"),
        ("teacher.head:input", "'teacher.head:input' is no module of a model"),
        ("teacher.head@0", "'teacher.head@0' is no module of a model"),
        ("teacher.haed", "'teacher.haed': Deep has no module 'haed'; did you mean head"),
        ("teacher.head.weight", "Deep has no module 'head.weight'"),
    ],
)
def test_a_module_that_is_none_is_told_at_its_place(tmp_path, module, message):
    auxiliary = {"again": {"module": module, "inputs": {"input": "student.rows"}}}
    ((path, text),) = faults_of(tmp_path, {**DEEP, "auxiliary": auxiliary})
    assert path == "stages.stage0.auxiliary.again.module"
    assert message in text


def test_a_models_module_that_fails_is_told_at_the_line_that_calls_it_again(tmp_path):
    auxiliary = {"again": {"module": "teacher.head", "inputs": {"input": "inputs"}}}
    spy = {"type": "Spy", "inputs": {"a": "again", "b": "student"}}
    stage = {**DEEP, "auxiliary": auxiliary, "criterion": {"spy": spy}}
    ((path, text),) = faults_of(tmp_path, stage, data=True)
    assert path == "stages.stage0.auxiliary.again"
    assert "Linear failed on input=inputs (2, 4)" in text


def test_a_models_module_needs_its_inputs(tmp_path):
    stage = {**DEEP, "auxiliary": {"again": {"module": "teacher.head"}}}
    ((path, text),) = faults_of(tmp_path, stage)
    assert path == "stages.stage0.auxiliary.again"
    assert "the module needs the input 'input'; wire it" in text


ADAPTED = {**TAUGHT, "criterion": {"hint": {**HINT, "adapter": "auto"}}}


def test_an_adapter_is_trained_noted_and_in_the_checkpoint(tmp_path):
    told = []
    ready = seed_run(tmp_path, ADAPTED, {"epochs": 1}, told=told)
    still = {"optimizer": {"type": "SGD", "params": {"lr": 0.0}}}
    other = seed_run(tmp_path / "still", {**ADAPTED, **still})
    train_stage(ready, 0)
    train_stage(other, 0)
    key = ("adapters", "stage0", "hint")
    learned = ready.parts.modules[key]
    assert set(learned.state_dict()) == {"parts.0.layer.weight", "parts.0.layer.bias"}
    assert learned.parts[0].layer.weight.shape == (12, 8)
    for name, value in other.parts.modules[key].state_dict().items():
        assert not torch.equal(value, learned.state_dict()[name])
    saved = load_state(ready.checkpoint)["parts"]["|".join(key)]
    assert all(torch.equal(v, saved[n]) for n, v in learned.state_dict().items())
    (start,) = [event for name, event in told if name == "stage_start"]
    assert "the adapter of 'hint': linear layer 8 -> 12 (108 parameters)" in start.notes
    assert start.trainable == start.parameters - 27 + 108  # less the head, which is left out
    train_stage(ready, 1)
    assert ready.parts.modules[key] is learned


def test_an_adapted_loss_is_that_of_the_adapted_feature(tmp_path):
    ready = seed_run(tmp_path, ADAPTED)
    train_stage(ready, 0)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    with roles_in_force(assembly), torch.no_grad():
        losses = assembly.distiller(batch())
        adapter, models = assembly.adapters["hint"], assembly.roles
        ours, theirs = (models[role].body(batch().inputs) for role in ("student", "teacher"))
        layer = adapter.parts[0].layer
        expected = F.mse_loss(ours @ layer.weight.T + layer.bias, theirs)
    torch.testing.assert_close(losses["hint"], expected)


def test_several_features_are_adapted_each_to_its_own(tmp_path):
    inputs = {
        "ours": ["student.body", "student.body.0"],
        "targets": "targets",
        "theirs": ["teacher.body", "teacher.head"],
        "one": "student.head",
        "other": "teacher.body.0",
    }
    spy = {"type": "Spy", "inputs": inputs, "adapter": "auto"}
    ready = seed_run(tmp_path, {**TAUGHT, "criterion": {"spy": spy}})
    train_stage(ready, 0)
    (key,) = [key for key in ready.parts.modules if key[0] == "adapters"]
    assert ready.parts.modules[key].chosen == [
        "linear layer 8 -> 12",
        "linear layer 8 -> 3",
        "linear layer 3 -> 12",
    ]
    given = ready.parts.modules["losses", "stage0", "spy"].given
    assert [one.shape[1] for one in given["ours"]] == [12, 3]
    assert given["one"].shape[1] == 12


def test_what_an_auxiliary_module_makes_of_the_student_is_the_students(tmp_path):
    mine = {"type": "Linear", "params": {"in_features": 8, "out_features": 5}}
    auxiliary = {"mine": {**mine, "inputs": {"input": "student.body"}}}
    hint = {**HINT, "inputs": {"input": "mine", "target": "teacher.body"}, "adapter": "auto"}
    told = []
    ready = seed_run(
        tmp_path, {**TAUGHT, "auxiliary": auxiliary, "criterion": {"hint": hint}}, told=told
    )
    train_stage(ready, 0)
    assert "the adapter of 'hint': linear layer 5 -> 12 (72 parameters)" in told[0][1].notes


def test_features_that_fit_need_no_layer_and_train_all_the_same(tmp_path):
    hint = {**HINT, "inputs": {"input": "student", "target": "teacher"}, "adapter": "auto"}
    told = []
    train_stage(seed_run(tmp_path, {**TAUGHT, "criterion": {"hint": hint}}, told=told), 0)
    assert "the adapter of 'hint': nothing (0 parameters)" in told[0][1].notes


@pytest.mark.parametrize(
    "inputs",
    [
        {"a": "student.body", "b": "targets"},
        {"a": "teacher.body", "b": "targets"},
        {"a": "student.body", "b": "student.head", "c": "teacher.body"},
        {"a": "inputs"},
    ],
)
def test_an_adapter_needs_two_sides(tmp_path, inputs):
    spy = {"type": "Spy", "inputs": inputs, "adapter": "auto"}
    criterion = {"ce": {"type": "CrossEntropyLoss"}, "spy": spy}
    ((path, message),) = faults_of(tmp_path, {**TAUGHT, "criterion": criterion})
    assert path == "stages.stage0.criterion.spy.adapter"
    assert message.startswith(
        "finds nothing to adapt: 'inputs' has to wire features of the student"
    )


def test_an_adapter_pairs_inputs_by_their_names_and_leaves_others_alone(tmp_path):
    inputs = {
        "student_features": "student.body",
        "teacher_features": "teacher.body",
        "student_more": "student.head",
        "bias": "teacher.head.bias",
    }
    spy = {"type": "Spy", "inputs": inputs, "adapter": "auto"}
    criterion = {"ce": {"type": "CrossEntropyLoss"}, "spy": spy}
    ready = seed_run(tmp_path, {**TAUGHT, "criterion": criterion})
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    calls = {call.name: call for call in assembly.distiller.calls()}
    adapting, term = calls["spy.adapter"].arguments, calls["spy"].arguments
    assert [address.text for address in adapting["features"]] == ["student.body"]
    assert [address.text for address in adapting["like"]] == ["teacher.body"]
    values = {name: address.value for name, address in term.items()}
    assert values["student_features"] == "spy.adapter"
    assert values["student_more"] == "student.head"
    assert values["teacher_features"] == "teacher.body"


def test_features_that_no_adapter_makes_meet_are_told_at_the_term(tmp_path):
    inputs = {"input": "student.body", "target": ["teacher.body", "teacher.head"]}
    hint = {**HINT, "inputs": inputs, "adapter": "auto"}
    ((path, text),) = faults_of(tmp_path, {**TAUGHT, "criterion": {"hint": hint}}, data=True)
    assert path == "stages.stage0.criterion.hint"
    assert "1 features cannot meet 2 others" in text


def test_shapes_that_differ_without_an_adapter_name_both_and_point_to_it(tmp_path):
    ((path, text),) = faults_of(tmp_path, {**TAUGHT, "criterion": {"hint": HINT}}, data=True)
    assert path == "stages.stage0.criterion.hint"
    assert "MSELoss failed on input=student.body (2, 8), target=teacher.body (2, 12): " in text
    assert text.endswith(
        "; 'adapter: auto' on the term brings the student's shapes to the teacher's"
    )


@pytest.mark.parametrize(
    "inputs",
    [
        {"input": "student.body", "target": "student.head"},  # no teacher's
        {"input": "teacher.body", "target": "teacher.head"},  # no student's
    ],
)
def test_there_is_no_pointing_where_an_adapter_would_not_help(tmp_path, inputs):
    hint = {"type": "MSELoss", "inputs": inputs}
    criterion = {"ce": {"type": "CrossEntropyLoss"}, "hint": hint}
    ((_, text),) = faults_of(tmp_path, {**TAUGHT, "criterion": criterion}, data=True)
    assert "failed on" in text
    assert "adapter" not in text


def test_the_adapter_can_be_selected_by_name(tmp_path):
    freeze = {"freeze": ["criterion.hint.adapter"]}
    ready = seed_run(tmp_path, ADAPTED, {**freeze, "epochs": 1})
    train_stage(ready, 0)
    adapter = ready.parts.modules["adapters", "stage0", "hint"]
    before = copy.deepcopy(adapter.state_dict())
    train_stage(ready, 1)
    assert all(torch.equal(v, before[n]) for n, v in adapter.state_dict().items())
