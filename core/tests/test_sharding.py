"""Tensors of which each process holds a part; this file is also what those processes run."""

import copy
import math

import pytest
import torch
from torch import nn

from distill import distributed
from distill.testing import ToyMLP, run_processes
from distill.training import sharding

CPU = torch.device("cpu")


def test_whole_tensors_are_left_as_they_are():
    value = {"a": [torch.ones(2)], "b": 3}
    assert sharding.whole(value)["a"][0] is value["a"][0]
    assert sharding.whole(value)["b"] == 3
    assert not sharding.is_parted(value["a"][0])
    assert sharding.local_part(value["a"][0]) is value["a"][0]
    state = {"state": {}}
    assert sharding.parted(state, [torch.ones(2)]) is state


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_element_that_is_not_finite_is_found(bad, dtype):
    gradients = [torch.ones(3), torch.ones(2, 2, dtype=dtype)]
    assert sharding.all_finite(gradients)
    gradients[1][1, 0] = bad
    before = [gradient.clone() for gradient in gradients]
    assert not sharding.all_finite(gradients)
    for gradient, value in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sparse_gradients_are_looked_at(bad):
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1, 1])).sum().backward()
    assert sharding.all_finite([layer.weight.grad])
    (layer(torch.tensor([2])) * bad).sum().backward()
    assert not sharding.all_finite([layer.weight.grad])


def test_no_gradient_is_finite():
    assert sharding.all_finite([])


def test_weights_are_overwritten_in_place():
    module, other = ToyMLP(), ToyMLP()
    weights = list(module.parameters())
    sharding.load(module, other.state_dict())
    assert all(a is b for a, b in zip(weights, module.parameters(), strict=True))
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_processes_work_together():
    run_processes(__file__)


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain = ToyMLP(hidden=5)  # which two processes cannot part evenly
    module = copy.deepcopy(plain)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return plain, module


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert type(value) is torch.Tensor, name
        torch.testing.assert_close(value, theirs[name].detach(), rtol=0, atol=0)


def parts():
    """What is parted becomes whole, and the other way round."""
    plain, module = sharded()
    state = module.state_dict()
    assert all(sharding.is_parted(value) for value in state.values())
    assert sum(sharding.local_part(v).numel() for v in state.values()) < 45
    equal(sharding.whole(state), plain.state_dict())
    other = ToyMLP(hidden=5)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.fill_(number)
    sharding.load(module, other.state_dict())
    equal(sharding.whole(module.state_dict()), other.state_dict())


def optimizers():
    """An optimizer's state goes on from a whole one, which is that of a single process."""
    plain, module = sharded()
    inputs = torch.randn(4, 4)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, module)]
    for _ in range(2):
        for model, optimizer in zip((plain, module), optimizers, strict=True):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    whole = sharding.whole(optimizers[1].state_dict())
    for number, kept in optimizers[0].state_dict()["state"].items():
        for name, value in kept.items():
            torch.testing.assert_close(whole["state"][number][name], value)
    parameters = list(module.parameters())
    again = torch.optim.Adam(parameters, lr=0.1)
    again.load_state_dict(sharding.parted(whole, parameters))
    for number, kept in sharding.whole(again.state_dict())["state"].items():
        for name, value in kept.items():
            assert torch.equal(value, whole["state"][number][name])


def gradients():
    """An element that is not finite on one process is found on both."""
    _, module = sharded()
    module(torch.ones(2, 4)).sum().backward()
    found = [p.grad for p in module.parameters()]
    assert sharding.all_finite(found)
    if distributed.rank() == 1:
        sharding.local_part(found[0]).view(-1)[0] = math.nan
    assert not sharding.all_finite(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join(CPU)
    parts()
    optimizers()
    gradients()
