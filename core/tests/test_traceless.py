"""Trial forwards that leave no trace in a module's buffers."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from distill.testing import ToyConvNet
from distill.training.traceless import buffers_kept


class Remembering(nn.Module):
    """Keeps state in buffers in every way there is: changed, replaced, made late."""

    def __init__(self):
        super().__init__()
        self.register_buffer("changed", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("late", None)

    def forward(self):
        self.changed += 1
        self.replaced = torch.ones(5)
        self.late = torch.ones(1)
        self.register_buffer("new", torch.ones(1))


def test_buffers_are_kept_however_a_module_holds_them():
    module = Remembering()
    changed, replaced = module.changed, module.replaced
    with buffers_kept(module):
        module()
    assert module.changed is changed
    assert module.replaced is replaced
    assert changed.tolist() == replaced.tolist() == [0.0, 0.0]
    assert module.late is None
    assert "new" not in module._buffers


def test_buffers_are_kept_after_an_error():
    model = ToyConvNet().train()
    model.head = nn.Linear(99, 3)
    with pytest.raises(RuntimeError), buffers_kept(model):
        model(torch.randn(2, 1, 4, 4))
    assert model.norm.num_batches_tracked == 0
    assert model.norm.running_var.tolist() == [1.0] * 4


class Caring(nn.Module):
    """Sees to its own buffers, and has a part that does not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(2))
        self.part, self.is_kept = Remembering(), False

    @contextmanager
    def unchanged(self):
        self.is_kept = True
        yield
        self.is_kept = False

    def forward(self):
        self.part()
        if not self.is_kept:
            self.bank += 1


def test_a_module_may_see_to_its_own_buffers(monkeypatch):
    module, copied = Caring(), []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copied.append(t) or clone(t))
    with buffers_kept(module):
        module()
    assert module.bank.tolist() == module.part.changed.tolist() == [0.0, 0.0]
    assert not any(tensor is module.bank for tensor in copied)
    module()
    assert module.bank.tolist() == [1.0, 1.0]
