import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import Batch
from distill.builtin.torch_components import CrossEntropyLoss
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call, value_name
from distill.testing import ToyMLP


class Spy(nn.Module):
    """A loss that notes what it is given."""

    def forward(self, student, teacher, targets=None):
        self.seen = student, teacher, targets
        return F.mse_loss(student, teacher)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, features):
        return {"features": self.scale * features}


def net(seed, **params):
    torch.manual_seed(seed)
    return ToyMLP(**params)


def batch(size=6):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, 4, generator=generator)
    return Batch(inputs, torch.arange(size) % 3, torch.arange(size), {"double": inputs * 2})


def address(text):
    """``value`` or ``value/key``."""
    value, *keys = text.split("/")
    return Address(text, value, tuple(keys))


def call(name, module, **addresses):
    return Call(name, module, {n: address(a) for n, a in addresses.items()})


def distiller(student, terms, *, teachers=None, auxiliary=(), weights=None, **more):
    teachers = {"teacher": net(9)} if teachers is None else teachers
    for teacher in teachers.values():
        teacher.requires_grad_(False).eval()
    weights = weights or {term.name: 1.0 for term in terms}
    return Distiller(student, teachers, auxiliary, Criterion(terms, weights), **more)


def cross_entropy():
    return call("ce", CrossEntropyLoss(), student="student", targets="targets")


def imitate(**addresses):
    return call("kd", nn.MSELoss(), **{"input": "student", "target": "teacher", **addresses})


def test_losses_and_gradients_equal_those_of_a_hand_written_step():
    student, teacher = net(1), net(2, hidden=8)
    by_hand = copy.deepcopy(student)
    scale = Scaled()
    module = distiller(
        student,
        [cross_entropy(), imitate(input="scaled/features", target="teacher.body.0")],
        teachers={"teacher": teacher},
        auxiliary=[call("scaled", scale, features="student.body.0")],
        weights={"ce": 1.0, "kd": 0.3},
        captures={"student": ["body.0"], "teacher": ["body.0"]},
    )
    losses = module(batch())
    losses["total"].backward()

    hand_scale = torch.tensor(2.0, requires_grad=True)
    data = batch()
    features = by_hand.body[0](data.inputs)
    ce = F.cross_entropy(by_hand.head(features.relu()), data.targets)
    with torch.no_grad():
        target = teacher.body[0](data.inputs)
    kd = F.mse_loss(hand_scale * features, target)
    (ce + 0.3 * kd).backward()

    assert torch.equal(losses["ce"], ce)
    assert torch.equal(losses["kd"], kd)
    assert torch.equal(losses["total"], ce + 0.3 * kd)
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(scale.scale.grad, hand_scale.grad)


def test_the_teacher_gets_no_gradient_even_where_its_parameters_want_one():
    teacher = net(2)
    module = distiller(net(1), [imitate()], teachers={"teacher": teacher})
    teacher.requires_grad_(True)
    module(batch())["total"].backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_teachers_stay_in_the_mode_they_were_put_in(mode):
    student, teacher, aux = net(1, dropout=0.5), net(2, dropout=0.5), Scaled()
    module = distiller(
        student,
        [imitate()],
        teachers={"teacher": teacher},
        auxiliary=[call("aux", aux, features="student")],
    )
    teacher.train(mode == "train")
    for training in (True, False, True):
        module.train(training)
        assert teacher.training is teacher.dropout.training is (mode == "train")
        assert student.dropout.training is aux.training is training
        assert module.training is module.criterion.training is training
    module.eval()
    assert student.dropout.training is False
    module.train()
    outputs = [module.values(batch())["teacher"] for _ in range(2)]
    assert torch.equal(*outputs) is (mode == "eval")


def test_several_teachers_each_have_their_own_values():
    left, right = net(2), net(3, hidden=5)
    module = distiller(
        net(1),
        [
            call("left", nn.MSELoss(), input="student", target="left"),
            call("right", nn.MSELoss(), input="student", target="right"),
        ],
        teachers={"left": left, "right": right},
        captures={"left": ["body"], "right": ["body"]},
    )
    values = module.values(batch())
    assert torch.equal(values["left"], left(batch().inputs))
    assert torch.equal(values["right"], right(batch().inputs))
    assert values["left.body"].shape == (6, 8)
    assert values["right.body"].shape == (6, 5)


def test_auxiliary_modules_feed_each_other():
    module = distiller(
        net(1),
        [imitate(input="second/features", target="teacher")],
        auxiliary=[
            call("first", Scaled(), features="student"),
            call("second", Scaled(), features="first/features"),
        ],
    )
    values = module.values(batch())
    assert torch.equal(values["second"]["features"], values["student"] * 4)


def test_captured_values_equal_features_run_by_hand():
    student, teacher = net(1), net(2)
    module = distiller(
        student,
        [cross_entropy()],
        teachers={"teacher": teacher},
        captures={"student": ["body.0", "head:input", ":input"], "teacher": ["body.1"]},
    )
    values = module.values(batch())
    inputs = batch().inputs
    assert torch.equal(values["student.body.0"], student.body[0](inputs))
    assert torch.equal(values["student.head:input"], student.body[0](inputs).relu())
    assert torch.equal(values["student:input"], inputs)
    assert torch.equal(values["teacher.body.1"], teacher.body[0](inputs).relu())


def test_values_of_the_batch_are_there_under_their_names():
    data = batch()
    values = distiller(net(1), [cross_entropy()]).values(data)
    assert values["inputs"] is data.inputs
    assert values["targets"] is data.targets
    assert values["index"] is data.index
    assert values["extras"]["double"] is data.extras["double"]


def test_losses_see_float32_under_autocast_and_models_run_reduced():
    spy = Spy()
    module = distiller(
        net(1),
        [call("spy", spy, student="student.body.0", teacher="teacher.body.0")],
        captures={"student": ["body.0"], "teacher": ["body.0"]},
        autocast=("cpu", torch.bfloat16),
    )
    value = module.values(batch())["student.body.0"]
    assert torch.equal(value, value.bfloat16().float())  # rounded: it came from a reduced model
    loss = module(batch())["total"]
    assert loss.dtype == torch.float32
    assert [value.dtype for value in spy.seen[:2]] == [torch.float32] * 2
    loss.backward()
    assert module.student.body[0].weight.grad.abs().sum() > 0


def test_hooks_let_forwards_outside_the_distiller_pass():
    student = net(1)
    module = distiller(student, [cross_entropy()], captures={"student": ["body"]})
    module(batch())
    for _ in range(2):
        student(batch().inputs)
    assert module.captures["student"]._values == {}
    module(batch())


def test_a_step_that_failed_leaves_nothing_for_the_next():
    student = net(1)
    module = distiller(student, [cross_entropy()], captures={"student": ["body"]})
    wrong_head = student.head
    student.head = nn.Linear(99, 3)
    with pytest.raises(RuntimeError):
        module(batch())
    student.head = wrong_head
    module(batch())


def test_release_gives_the_models_back_as_they_were():
    student, teacher = net(1), net(2)
    module = distiller(
        student,
        [cross_entropy()],
        teachers={"teacher": teacher},
        captures={"student": ["body"], "teacher": ["body"]},
    )
    assert student.body[1].inplace is False
    module.release()
    for model in (student, teacher):
        assert model.body[1].inplace is True
        assert not model.body._forward_hooks


def test_everything_with_state_is_registered_once():
    student, teacher, aux = net(1), net(2), Scaled()
    module = distiller(
        student,
        [cross_entropy()],
        teachers={"teacher": teacher},
        auxiliary=[call("aux", aux, features="student")],
    )
    expected = [*student.parameters(), *teacher.parameters(), *aux.parameters()]
    assert [id(p) for p in module.parameters()] == [id(p) for p in expected]
    assert module.models() == {"student": student, "teacher": teacher}


@pytest.mark.parametrize(
    ("role", "path", "name"),
    [
        ("student", "", "student"),
        ("student", "layer2", "student.layer2"),
        ("teacher", ":input", "teacher:input"),
        ("teacher", "fc:input", "teacher.fc:input"),
    ],
)
def test_a_captured_value_is_named_as_its_reference(role, path, name):
    assert value_name(role, path) == name
