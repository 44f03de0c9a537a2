import pytest
import torch
from torch import nn

from distill import Batch, ConfigError
from distill.testing import toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.freezing import freeze
from distill.training.parts import Parts
from distill.training.stage import assemble, roles_in_force

CPU = torch.device("cpu")
CE = {"ce": {"type": "CrossEntropyLoss"}}
REGRESSOR = {
    "type": "Linear",
    "params": {"in_features": 8, "out_features": 12},
    "inputs": {"input": "student.body"},
}
HINT = {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.body"}}
OTHER_HINT = {"type": "MSELoss", "inputs": {"input": "other", "target": "teacher.body"}}
AGAIN = {"type": "MSELoss", "inputs": {"input": "again", "target": "teacher.body"}}
DISTIL = {"teacher": {"model": "wide"}, "auxiliary": {"regressor": REGRESSOR}}


class Imitation(nn.Module):
    """A loss with a parameter, wired by itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, targets, temperature=1.0):
        return (self.scale * student - teacher).square().mean()


class Anything(nn.Module):
    def forward(self, **values):
        return sum(value.mean() for value in values.values())


class NoModule:
    def forward(self, student):
        return student


REGISTRY = toy_registry(losses={"Imitation": Imitation, "Anything": Anything, "NoModule": NoModule})


class Assembler:
    """Puts the stages of one experiment together, one after another."""

    def __init__(self, folder, *stages, seed=0, **keys):
        self.experiment = toy_experiment(folder, *stages, **keys)
        self.builder = Builder(self.experiment, REGISTRY)
        self.models = {name: self.builder.model(name, seed) for name in self.experiment.models}
        self.parts = Parts()
        self.seed = seed

    def stage(self, number=0):
        stage = self.experiment.stages[number]
        return assemble(self.builder, stage, self.models, self.parts, self.seed, CPU)


def faults_of(folder, stage, **keys):
    assembly = Assembler(folder, stage, **keys).stage()
    assert assembly.distiller is None
    return [(fault.path, fault.message) for fault in assembly.faults]


def arguments(assembly, name):
    (call,) = [call for call in assembly.distiller.criterion.calls if call.name == name]
    return {key: address.text for key, address in call.arguments.items()}


def test_student_teacher_and_targets_are_wired_by_themselves(tmp_path):
    stage = {"teacher": {"model": "wide"}, "criterion": {"kd": {"type": "Imitation"}}}
    assembly = Assembler(tmp_path, stage).stage()
    assert arguments(assembly, "kd") == {
        "student": "student",
        "teacher": "teacher",
        "targets": "targets",
    }


def test_wiring_in_the_file_goes_before_the_default(tmp_path):
    term = {"type": "Imitation", "inputs": {"student": "student.body", "targets": "index"}}
    stage = {"teacher": {"model": "wide"}, "criterion": {"kd": term}}
    wired = arguments(Assembler(tmp_path, stage).stage(), "kd")
    assert wired == {"student": "student.body", "teacher": "teacher", "targets": "index"}


def test_what_is_captured_follows_from_the_references(tmp_path):
    term = {"type": "Anything", "inputs": {"a": "student.head:input", "b": "student.head:input"}}
    stage = {**DISTIL, "criterion": {"hint": HINT, "any": term}}
    captures = Assembler(tmp_path, stage).stage().distiller.captures
    assert {role: capture.paths for role, capture in captures.items()} == {
        "student": ("body", "head:input"),
        "teacher": ("body",),
    }


def test_a_forward_that_takes_anything_can_be_wired_anyhow(tmp_path):
    term = {"type": "Anything", "inputs": {"one": "student", "two": "inputs"}}
    assembly = Assembler(tmp_path, {"criterion": {"any": term}}).stage()
    assert arguments(assembly, "any") == {"one": "student", "two": "inputs"}


@pytest.mark.parametrize(
    ("term", "path", "message"),
    [
        ({"type": "MSELoss"}, "", "MSELoss needs the input 'input'; wire it"),
        ({"type": "Imitation"}, "", "Imitation needs a teacher, and stage 'stage0' has none"),
        (
            {"type": "CrossEntropyLoss", "inputs": {"studnet": "student"}},
            ".inputs.studnet",
            "takes no input 'studnet'; did you mean student?",
        ),
        (
            {"type": "CrossEntropyLoss", "inputs": {"student": "student.haed"}},
            ".inputs.student",
            "'student.haed': ToyMLP has no module 'haed'; did you mean head",
        ),
        (
            {"type": "CrossEntropyLoss", "inputs": {"student": "student.logits:input"}},
            ".inputs.student",
            "'student.logits:input': ToyMLP has no module 'logits'",
        ),
        ({"type": "NoModule"}, "", "NoModule gave NoModule, which is no nn.Module"),
        ({"type": "CrossEntropy"}, ".type", "there is no loss 'CrossEntropy'; did you mean"),
        (
            {"type": "CrossEntropyLoss", "params": {"reduction": 3}},
            ".params.reduction",
            "expected text, got the number 3",
        ),
    ],
)
def test_what_is_wrong_with_a_term_is_told_at_its_place(tmp_path, term, path, message):
    ((place, text), *_) = faults_of(tmp_path, {"criterion": {"odd": term}})
    assert place == f"stages.stage0.criterion.odd{path}"
    assert message in text


def test_all_faults_of_a_stage_are_told_at_once(tmp_path):
    stage = {"criterion": {"one": {"type": "MSELoss"}, "two": {"type": "Nonsense"}}}
    places = {place for place, _ in faults_of(tmp_path, stage)}
    assert places == {
        "stages.stage0.criterion.one",
        "stages.stage0.criterion.two.type",
    }


def test_all_that_trains_is_student_auxiliary_modules_and_losses(tmp_path):
    stage = {**DISTIL, "criterion": {"kd": {"type": "Imitation"}, "hint": HINT}}
    assembly = Assembler(tmp_path, stage).stage()
    with roles_in_force(assembly):
        trainable = [id(p) for p in assembly.trainable()]
    expected = [
        *assembly.roles["student"].parameters(),
        *assembly.auxiliary["regressor"].parameters(),
        assembly.terms["kd"].scale,
    ]
    assert trainable == [id(p) for p in expected]


def test_roles_are_in_force_for_a_while(tmp_path):
    stage = {**DISTIL, "criterion": {"hint": HINT}, "freeze": ["student.head"]}
    stages = Assembler(tmp_path, stage)
    assembly = stages.stage()
    student, teacher = assembly.roles["student"], assembly.roles["teacher"]
    student.body.requires_grad_(False)
    student.eval()
    teacher.train()
    with roles_in_force(assembly):
        freeze(stages.builder, assembly)
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not teacher.training
        assert not student.head.weight.requires_grad
        assert student.body[1].inplace is False
        assembly.distiller.train()
    assert all(p.requires_grad for p in [*teacher.parameters(), *student.head.parameters()])
    assert not any(p.requires_grad for p in student.body.parameters())
    assert teacher.training
    assert not student.training
    assert student.body[1].inplace is True


def test_roles_are_given_back_after_an_error(tmp_path):
    assembly = Assembler(tmp_path, {"teacher": {"model": "wide"}}).stage()
    with pytest.raises(ConfigError), roles_in_force(assembly):
        raise ConfigError([])
    assert all(p.requires_grad for p in assembly.roles["teacher"].parameters())


def test_a_teacher_may_teach_in_train_mode(tmp_path):
    assembly = Assembler(tmp_path, {"teacher": {"model": "wide", "mode": "train"}}).stage()
    assembly.roles["teacher"].eval()
    with roles_in_force(assembly):
        assert assembly.roles["teacher"].training
        assert not any(p.requires_grad for p in assembly.roles["teacher"].parameters())


def test_an_inherited_or_reused_module_is_the_same_and_a_written_one_is_new(tmp_path):
    stages = Assembler(
        tmp_path,
        {**DISTIL, "criterion": {"hint": HINT}},
        {"epochs": 1},
        {"auxiliary": {"other": REGRESSOR}, "criterion": {"hint": OTHER_HINT}},
        {"auxiliary": {"again": {"reuse": "regressor"}}, "criterion": {"hint": AGAIN}},
    )
    first, second, third, fourth = (stages.stage(number) for number in range(4))
    assert second.auxiliary["regressor"] is first.auxiliary["regressor"]
    assert second.terms["hint"] is first.terms["hint"]
    assert third.terms["hint"] is not first.terms["hint"]
    assert not torch.equal(third.auxiliary["other"].weight, first.auxiliary["regressor"].weight)
    assert fourth.auxiliary["again"] is first.auxiliary["regressor"]


def test_new_modules_start_from_weights_that_depend_on_seed_and_name_alone(tmp_path):
    def weights(seed):
        torch.rand(seed + 1)
        stage = Assembler(tmp_path, {**DISTIL, "criterion": {"hint": HINT}}, seed=seed).stage()
        return stage.auxiliary["regressor"].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_models_of_one_type_and_seed_start_from_equal_weights(tmp_path):
    models = {
        "mlp": {"type": "ToyMLP"},
        "twin": {"type": "ToyMLP"},
        "sibling": {"type": "ToyMLP", "seed": 1},
    }
    built = Assembler(tmp_path, {}, models=models).models
    weights = {name: model.head.weight for name, model in built.items()}
    assert torch.equal(weights["mlp"], weights["twin"])
    assert not torch.equal(weights["mlp"], weights["sibling"])
    again = Assembler(tmp_path, {}, models=models, seed=5).models
    assert not torch.equal(again["mlp"].head.weight, weights["mlp"])


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_models_run_in_the_precision_of_the_stage(tmp_path, precision, dtype):
    stages = Assembler(tmp_path, {"precision": precision})
    batch = Batch(torch.randn(2, 4), None, torch.arange(2))
    logits = stages.stage().distiller.values(batch)["student"]
    assert logits.dtype == torch.float32  # as losses see them
    assert torch.equal(logits, logits.to(dtype).float())
    if dtype != torch.float32:
        exact = Assembler(tmp_path, {}).stage().distiller.values(batch)["student"]
        assert not torch.equal(logits, exact)
