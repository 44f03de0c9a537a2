"""What a stage, or the whole experiment, runs in a model's place."""

import copy

import pytest
import torch
from torch import nn

from distill import Batch, ConfigError, DistillError, Observer, check, run
from distill.builtin.redesigners import empty, sequential, whole
from distill.model_evaluation import evaluate
from distill.testing import ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.checkpoint import load_state, load_weights
from distill.training.seed_run import SeedRun
from distill.training.trainer import train_stage

CPU = torch.device("cpu")
BETWEEN = {"type": "Linear", "params": {"in_features": 8, "out_features": 8}}
CE = {"type": "CrossEntropyLoss"}


class Bottlenecked(nn.Module):
    """Another model around parts of the first."""

    def __init__(self, model, width=2):
        super().__init__()
        self.body, self.head = model.body, model.head
        self.narrow = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))

    def forward(self, inputs):
        return self.head(self.narrow(self.body(inputs)))


def with_all(model, auxiliary, scale=1.0):
    """A redesigner that is given the stage's auxiliary modules."""
    return nn.Sequential(model, *auxiliary.values(), nn.Softmax(1))


def broken(model):
    raise RuntimeError("this model is too small")


def no_module(model):
    return model.head.weight


REDESIGNERS = {
    "Bottlenecked": Bottlenecked,
    "with_all": with_all,
    "broken": broken,
    "no_module": no_module,
}


class Killed(Exception):
    """Stands in for a kill."""


class Bomb(Observer):
    def epoch_end(self, event):
        if event.position.epoch == 1 and event.stage == "stage1":
            raise Killed


def registry(**observers):
    return toy_registry(model_redesigners=REDESIGNERS, observers={"Bomb": Observer, **observers})


def row(*modules):
    return {"type": "sequential", "params": {"modules": list(modules)}}


def seed_run(folder, *stages, **keys):
    experiment = toy_experiment(folder, *stages, **keys)
    builder = Builder(experiment, registry())
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, 0, CPU, folder / "run", lambda *_: None, models, sources)


def assembled(folder, stage, **keys):
    ready = seed_run(folder, stage, **keys)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    assembly.distiller.release()
    return assembly


def fault_of(folder, stage, **keys):
    with pytest.raises(ConfigError) as caught:
        check(toy_experiment(folder, stage, **keys), registry())
    (fault,) = caught.value.faults
    return fault.path, fault.message


def inputs(size=5):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(3))


def batch():
    return Batch(inputs(), torch.arange(5) % 3, torch.arange(5))


def test_a_row_is_the_models_own_modules_in_the_order_given():
    model = ToyMLP()
    made = sequential(model, {}, ["body.0", "body.1", "head"])
    assert list(made) == [model.body[0], model.body[1], model.head]
    assert [name for name, _ in made.named_children()] == ["body_0", "body_1", "head"]
    assert torch.equal(made(inputs()), model(inputs()))


def test_auxiliary_modules_stand_between_by_name():
    model, scale, unused = ToyMLP(), nn.Linear(8, 8), nn.Linear(1, 1)
    auxiliary = {"scale": scale, "unused": unused}
    made = sequential(model, auxiliary, ["body", {"auxiliary": "scale"}, "head"])
    assert list(made) == [model.body, scale, model.head]
    assert torch.equal(made(inputs()), model.head(scale(model.body(inputs()))))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["body", "haed"], r"ToyMLP has no module 'haed' \(it has: body, dropout, head\)"),
        (["body.7"], r"ToyMLP has no module 'body\.7'"),
        (["body", "head", "body"], "'body' comes twice; each module has one place in the row"),
        ([{"auxiliary": "scale"}] * 2, "'scale' comes twice"),
        (
            [{"auxiliary": "scael"}],
            r"the stage has no auxiliary module 'scael' \(it has: scale\)",
        ),
        ([{"module": "body"}], r"neither a path in the model nor \{auxiliary: name\}"),
        ([{}], "neither a path in the model"),
    ],
)
def test_a_row_of_what_is_not_there_is_refused(modules, message):
    with pytest.raises(ValueError, match=message):
        sequential(ToyMLP(), {"scale": nn.Linear(8, 8)}, modules)


def test_of_an_empty_model_nothing_is_left_and_whole_is_the_model_itself():
    model = ToyMLP()
    assert whole(model) is model
    assert list(empty(model).state_dict()) == []
    with pytest.raises(DistillError, match="its redesign is 'empty', and something asks for"):
        empty(model)(inputs())


def test_a_stage_runs_the_row_and_trains_the_auxiliary_module_in_it(tmp_path):
    stage = {
        "student": {"model": "mlp", "redesign": row("body", {"auxiliary": "scale"}, "head")},
        "auxiliary": {"scale": BETWEEN},
    }
    ready = seed_run(tmp_path, stage)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    student, scale = assembly.roles["student"], assembly.auxiliary["scale"]
    expected = student.head(scale(student.body(inputs())))
    assert torch.equal(assembly.distiller.values(batch())["student"], expected)
    assembly.distiller.release()
    before = copy.deepcopy([student.state_dict(), scale.state_dict()])
    train_stage(ready, 0)
    for module, was in zip((student, scale), before, strict=True):
        assert all(not torch.equal(value, was[n]) for n, value in module.state_dict().items())


def test_what_a_row_trains_is_the_very_models_and_its_file_is_the_whole_one(tmp_path):
    stage = {"student": {"model": "mlp", "redesign": row("body")}, "metrics": []}
    stage["teacher"] = {"model": "twin", "redesign": row("body")}
    stage["criterion"] = {
        "hint": {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
    }
    models = {"mlp": {"type": "ToyMLP"}, "twin": {"type": "ToyMLP", "seed": 1}}
    ready = seed_run(tmp_path, stage, models=models)
    before = copy.deepcopy(ready.models["mlp"].state_dict())
    train_stage(ready, 0)
    moved = {
        n for n, v in ready.models["mlp"].state_dict().items() if not torch.equal(v, before[n])
    }
    assert moved == {"body.0.weight", "body.0.bias"}
    left = ToyMLP()
    load_weights(left, tmp_path / "run" / "stage0" / "last.safetensors")
    assert torch.equal(left.body[0].weight, ready.models["mlp"].body[0].weight)
    assert all(p.requires_grad for p in ready.models["mlp"].parameters())


@pytest.mark.parametrize(
    ("reference", "of_row"),
    [
        ("student.body", lambda s, m: s.body(inputs())),
        ("student.body.0", lambda s, m: s.body[0](inputs())),
        ("student.-1:input", lambda s, m: m["scale"](s.body(inputs()))),
        ("student:input", lambda s, m: inputs()),
        ("student", lambda s, m: s.head(m["scale"](s.body(inputs())))),
        ("scale", lambda s, m: m["scale"](s.body(inputs()))),
        ("student.head.weight", lambda s, m: s.head.weight),
    ],
)
def test_references_in_a_row_are_those_of_the_model_and_of_the_module_in_it(
    tmp_path, reference, of_row
):
    target = {"type": "L1Loss", "inputs": {"input": reference, "target": "student"}}
    stage = {
        "student": {"model": "mlp", "redesign": row("body", {"auxiliary": "scale"}, "head")},
        "auxiliary": {"scale": BETWEEN},
        "criterion": {"odd": target},
    }
    ready = seed_run(tmp_path, stage)
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    values = assembly.distiller.values(batch())
    (call,) = assembly.distiller.criterion.calls
    found = call.arguments["input"].read(values)
    assembly.distiller.release()
    torch.testing.assert_close(found, of_row(assembly.roles["student"], assembly.auxiliary))


@pytest.mark.parametrize("reference", ["student.body.0", "student.body.-2", "student.body_0"])
def test_a_modules_path_stays_where_it_has_another_place_in_the_row(tmp_path, reference):
    hint = {"type": "L1Loss", "inputs": {"input": reference, "target": "student.body.1"}}
    student = {"model": "mlp", "redesign": row("body.0", "body.1", "head")}
    ready = seed_run(tmp_path, {"student": student, "criterion": {"hint": hint}})
    assembly = ready.assemble(ready.builder.experiment.stages[0])
    assert set(assembly.distiller.captures["student"].paths) == {"body_0", "body_1"}
    values, body = assembly.distiller.values(batch()), assembly.roles["student"].body
    assembly.distiller.release()
    assert torch.equal(values["student.body_0"], body[0](inputs()))


def test_an_auxiliary_module_may_be_fed_by_the_one_in_a_row(tmp_path):
    stage = {
        "student": {"model": "mlp", "redesign": row("body", {"auxiliary": "scale"}, "head")},
        "auxiliary": {"after": {**BETWEEN, "inputs": {"input": "scale"}}, "scale": BETWEEN},
        "criterion": {
            "hint": {"type": "MSELoss", "inputs": {"input": "after", "target": "student.body"}}
        },
    }
    assembly = assembled(tmp_path, stage)
    assert [call.name for call in assembly.distiller.calls()] == ["after", "hint"]


def test_a_module_that_a_row_leaves_out_cannot_be_asked_for(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student.head", "target": "student.body"}}
    stage = {"student": {"model": "mlp", "redesign": row("body")}, "criterion": {"hint": hint}}
    assert fault_of(tmp_path, stage) == (
        "stages.stage0.criterion.hint.inputs.input",
        "'student.head' is no part of what 'redesign' makes of the model",
    )


@pytest.mark.parametrize(
    ("redesign", "path", "message"),
    [
        (row("bdy"), "", "sequential cannot be built: ToyMLP has no module 'bdy'"),
        (row({"auxiliary": "scale"}), "", "sequential cannot be built: the stage has no auxiliary"),
        ("broken", "", "broken cannot be built: this model is too small"),
        ("no_module", "", "no_module gave Parameter, which is no nn.Module"),
        ("sequntial", "", "there is no model redesigner 'sequntial'; did you mean sequential"),
        (
            {"type": "sequential", "params": {"moduls": []}},
            ".params.moduls",
            "did you mean modules",
        ),
        ({"type": "whole", "params": {"model": 3}}, ".params.model", "model redesigner whole:"),
    ],
)
def test_a_redesign_that_cannot_be_is_told_at_its_line(tmp_path, redesign, path, message):
    place, text = fault_of(tmp_path, {"student": {"model": "mlp", "redesign": redesign}})
    type_ = ".type" if "sequntial" in str(redesign) and isinstance(redesign, dict) else ""
    assert place == f"stages.stage0.student.redesign{path}{type_}"
    assert message in text


def test_a_redesigner_whose_second_parameter_is_auxiliary_is_given_the_stages_modules(tmp_path):
    stage = {
        "student": {"model": "mlp", "redesign": {"type": "with_all", "params": {"scale": 2.0}}},
        "auxiliary": {"last": {"type": "Linear", "params": {"in_features": 3, "out_features": 3}}},
    }
    assembly = assembled(tmp_path, stage)
    student, last = assembly.roles["student"], assembly.auxiliary["last"]
    expected = last(student(inputs())).softmax(1)
    torch.testing.assert_close(assembly.distiller.student(inputs()), expected)
    place, _ = fault_of(
        tmp_path,
        {
            "student": {
                "model": "mlp",
                "redesign": {**stage["student"]["redesign"], "params": {"auxiliary": {}}},
            }
        },
    )
    assert place == "stages.stage0.student.redesign.params.auxiliary"


def test_a_model_is_redesigned_in_one_stage_and_whole_in_the_next(tmp_path):
    first = {"student": {"model": "mlp", "redesign": row("body", "head")}, "epochs": 1}
    ready = seed_run(tmp_path, first, {"student": {"model": "mlp"}})
    redesigned, plain = (ready.assemble(s) for s in ready.builder.experiment.stages)
    assert isinstance(redesigned.distiller.student, nn.Sequential)
    assert plain.distiller.student is ready.models["mlp"]


def test_needed_is_what_a_stage_does_unless_it_is_told_otherwise(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "student.body.0"}}
    extents = {}
    for redesign in ("needed", "whole", None):
        given = {"model": "mlp"} if redesign is None else {"model": "mlp", "redesign": redesign}
        assembly = assembled(tmp_path, {"student": given, "criterion": {"hint": hint}})
        extents[redesign] = assembly.distiller.extents["student"]
    assert extents == {"needed": "part", "whole": "whole", None: "part"}


def test_an_empty_student_does_not_run_while_an_auxiliary_module_learns_from_the_teacher(tmp_path):
    learn = {"type": "Linear", "params": {"in_features": 12, "out_features": 12}}
    stage = {
        "student": {"model": "mlp", "redesign": "empty"},
        "teacher": {"model": "wide"},
        "auxiliary": {"copy": {**learn, "inputs": {"input": "teacher.body"}}},
        "criterion": {
            "imitate": {"type": "MSELoss", "inputs": {"input": "copy", "target": "teacher.body"}}
        },
    }
    ready = seed_run(tmp_path, stage)
    before = copy.deepcopy(ready.models["mlp"].state_dict())
    assert train_stage(ready, 0).validation == {}
    assert all(torch.equal(v, before[n]) for n, v in ready.models["mlp"].state_dict().items())


def test_classes_are_not_counted_in_the_output_of_a_redesigned_model(tmp_path):
    hint = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher.body.0"}}
    stage = {
        "student": {"model": "mlp", "redesign": row("body")},
        "teacher": {"model": "twin"},
        "criterion": {"hint": hint},
        "metrics": ["accuracy"],
    }
    models = {"mlp": {"type": "ToyMLP"}, "twin": {"type": "ToyMLP", "seed": 1}}
    assert "accuracy" in train_stage(seed_run(tmp_path, stage, models=models), 0).validation


NARROW = {
    "mlp": {"type": "ToyMLP"},
    "narrow": {"type": "ToyMLP", "redesign": {"type": "Bottlenecked", "params": {"width": 3}}},
}
TWICE = ({"student": {"model": "narrow"}}, {"epochs": 2})


def test_a_model_may_be_redesigned_for_good(tmp_path):
    experiment = toy_experiment(
        tmp_path, *TWICE, models=NARROW, test={"dataset": "val", "metrics": ["accuracy"]}
    )
    result = run(experiment, registry=registry(), runs=tmp_path)
    student = result.student()
    assert isinstance(student, Bottlenecked)
    assert student.narrow[0].weight.shape == (3, 8)
    saved = load_state(result.directory / "checkpoint.pt")["models"]["narrow"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, saved[name])
    assert evaluate(experiment, registry(), student)[1] == result.stages[-1].test


def test_a_run_of_a_model_redesigned_for_good_goes_on_after_a_kill(tmp_path):
    files = []
    for folder, kill in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        experiment = toy_experiment(folder, *TWICE, models=NARROW, observers=["Bomb"])
        if kill:
            with pytest.raises(Killed):
                run(experiment, registry=registry(Bomb=Bomb), runs=folder)
        result = run(experiment, registry=registry(), runs=folder)
        files.append((result.directory / "stage1" / "last.safetensors").read_bytes())
    assert files[0] == files[1]


def test_new_layers_of_a_redesign_depend_on_the_seeds_alone(tmp_path):
    models = {**NARROW, "other": {**NARROW["narrow"], "seed": 1}}
    builder = Builder(toy_experiment(tmp_path, {}, models=models), registry())
    torch.rand(7)
    first, again, other = (builder.model(name, 0) for name in ("narrow", "narrow", "other"))
    assert torch.equal(first.narrow[0].weight, again.narrow[0].weight)
    assert not torch.equal(first.narrow[0].weight, other.narrow[0].weight)
    assert not torch.equal(first.narrow[0].weight, builder.model("narrow", 1).narrow[0].weight)
    assert torch.equal(first.head.weight, builder.model("mlp", 0).head.weight)


def test_a_checkpoint_is_that_of_the_model_before_its_redesign(tmp_path):
    ready = seed_run(tmp_path / "plain", {})
    train_stage(ready, 0)
    file = str(tmp_path / "plain" / "run" / "stage0" / "last.safetensors")
    models = {"mlp": {**NARROW["narrow"], "checkpoint": file}}
    builder = Builder(toy_experiment(tmp_path, {}, models=models), registry())
    model = builder.model("mlp", 5)
    assert torch.equal(model.head.weight, ready.models["mlp"].head.weight)


def test_a_models_redesign_that_cannot_be_is_told_at_the_model(tmp_path):
    models = {"mlp": {"type": "ToyMLP", "redesign": row("bdy")}}
    place, text = fault_of(tmp_path, {}, models=models)
    assert place == "models.mlp.redesign"
    assert "ToyMLP has no module 'bdy'" in text
