"""How models lie in memory and are called while a stage runs."""

import pytest
import torch

from distill.testing import ToyConvNet, ToyMLP
from distill.training.form import channels_last, compiled


class Stopped(Exception):
    pass


def wide():
    """A model whose convolution has more than one channel in, so that its layout can be told."""
    model = ToyConvNet()
    model.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    return model


def lies_last(model):
    return model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_lie_with_channels_last_for_a_while_and_stay_the_same():
    model, other = wide(), wide()
    weight, before = model.conv.weight, model.conv.weight.clone()
    with channels_last(iter([model, other])):
        assert lies_last(model)
        assert lies_last(other)
    for one in (model, other):
        assert one.conv.weight.is_contiguous()
    assert model.conv.weight is weight
    assert torch.equal(model.conv.weight, before)


def test_they_lie_as_before_after_an_error():
    model = wide()
    with pytest.raises(Stopped), channels_last([model]):
        raise Stopped
    assert model.conv.weight.is_contiguous()


def test_models_are_compiled_in_place_for_a_while(monkeypatch):
    called = []

    def compile_call(function, **_):
        return lambda *given: called.append("compiled") or function(*given)

    monkeypatch.setattr(torch, "compile", compile_call)
    model = ToyMLP()
    names = list(model.state_dict())
    with compiled(iter([model])):
        model(torch.zeros(1, 4))
        assert called == ["compiled"]
        assert list(model.state_dict()) == names
    model(torch.zeros(1, 4))
    assert called == ["compiled"]
