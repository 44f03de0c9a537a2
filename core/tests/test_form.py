"""How models lie in memory and are called while a stage runs."""

import copy
import shutil

import pytest
import torch
from torch import nn

from distill import Batch
from distill.builtin.torch_components import CrossEntropyLoss
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call
from distill.testing import ToyConvNet
from distill.training.form import channels_last, compiled

LAST = torch.channels_last


def net(seed=0):
    torch.manual_seed(seed)
    return ToyConvNet()


def images(size=6):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, 1, 5, 5, generator=generator)


class TwoConvs(nn.Module):
    """Convolutions whose weights differ between the two ways to lie in memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3)

    def forward(self, inputs):
        return self.second(self.first(inputs).relu())


def two_convs():
    torch.manual_seed(0)
    return TwoConvs()


def test_weights_of_convolutions_lie_channels_last_inside_and_contiguous_after():
    model, other = two_convs(), two_convs()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    with channels_last([model, other]):
        for each in (model, other):
            for conv in (each.first, each.second):
                assert conv.weight.is_contiguous(memory_format=LAST)
                assert not conv.weight.is_contiguous()
    for each in (model, other):
        for name, value in each.state_dict().items():
            assert value.is_contiguous()
            assert torch.equal(value, before[name])
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))


def test_weights_are_contiguous_again_after_an_error_too():
    model = two_convs()
    with pytest.raises(KeyError), channels_last([model]):
        raise KeyError
    assert model.first.weight.is_contiguous()


def test_channels_last_outputs_and_gradients_are_those_of_the_usual_form():
    inputs = torch.randn(2, 3, 6, 6)
    plain, model = two_convs(), two_convs()
    expected = plain(inputs)
    expected.square().mean().backward()
    with channels_last([model]):
        found = model(inputs.contiguous(memory_format=LAST))
        found.square().mean().backward()
        assert found.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def test_a_batch_of_images_can_lie_channels_last_and_nothing_else_is_touched():
    batch = Batch(torch.randn(2, 3, 4, 4), torch.randn(2, 3), torch.arange(2))
    placed = batch.to("cpu", memory_format=LAST)
    assert placed.inputs.is_contiguous(memory_format=LAST)
    assert torch.equal(placed.inputs, batch.inputs)
    assert placed.targets is batch.targets


def test_a_compiled_model_keeps_its_names_and_is_plain_again_after():
    model, other = net(), net()
    names = list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    with compiled([model]):
        assert model._compiled_call_impl is not None
        assert other._compiled_call_impl is None
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.named_modules()] == modules
        assert type(model) is ToyConvNet
    assert model._compiled_call_impl is None
    with pytest.raises(KeyError), compiled([model, other]):
        raise KeyError
    assert model._compiled_call_impl is other._compiled_call_impl is None
    assert model(images()).shape == (6, 3)


def distilled(student, teacher):
    """Compares a captured output and a captured input with the teacher's, beside the labels."""

    def call(name, module, **addresses):
        return Call(name, module, {n: Address(text, text) for n, text in addresses.items()})

    terms = [
        call("ce", CrossEntropyLoss(), student="student", targets="targets"),
        call("conv", nn.MSELoss(), input="student.conv", target="teacher.conv"),
        call("relu", nn.MSELoss(), input="student.relu:input", target="teacher.relu:input"),
    ]
    captures = {role: ["conv", "relu:input"] for role in ("student", "teacher")}
    teacher.requires_grad_(False).eval()
    criterion = Criterion(terms, {"ce": 1.0, "conv": 2.0, "relu": 0.5})
    return Distiller(student, {"teacher": teacher}, [], criterion, captures)


@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_what_is_captured_from_a_compiled_model_is_that_of_the_plain_one():
    """Takes a quarter of a minute, since torch compiles the student."""
    inputs = images()
    batch = Batch(inputs, torch.arange(len(inputs)) % 3, torch.arange(len(inputs)))
    plain, model, teacher = net(1), net(1), net(2)
    eager, ours = distilled(plain, copy.deepcopy(teacher)), distilled(model, teacher)
    with compiled([model]):
        for _ in range(2):
            expected, found = eager.values(batch), ours.values(batch)
            for name in ("student.conv", "student.relu:input", "teacher.conv", "student"):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
            losses, wanted = ours(batch), eager(batch)
            assert list(losses) == list(wanted) == ["ce", "conv", "relu", "total"]
            for each in (losses, wanted):
                each["total"].backward()
            torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)
            for (name, one), other in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5, msg=name)
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    eager.release()
    ours.release()
    assert torch.allclose(model.eval()(inputs), plain.eval()(inputs), atol=1e-5)
