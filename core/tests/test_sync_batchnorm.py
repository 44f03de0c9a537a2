"""Several processes' BatchNorm against one process's; those processes run this file too."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distill import distributed
from distill.testing import run_processes
from distill.training.sync_batchnorm import synchronized, uncounted

CPU = torch.device("cpu")
LAYERS = {
    "images": (lambda: nn.BatchNorm2d(3), (3, 4, 4)),
    "points": (lambda: nn.BatchNorm1d(3), (3,)),
    "volumes": (lambda: nn.BatchNorm3d(3, momentum=None), (3, 2, 2, 2)),
    "bare": (lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False), (3, 4, 4)),
    "far from zero": (lambda: nn.BatchNorm2d(3, momentum=0.3), (3, 4, 4)),
}
PARTS = {"both": ((0, 3), (3, 5)), "one is idle": ((0, 5), (0, 2))}
"""Which samples of five each process has; an idle one keeps step with samples not counted."""


def layer_and_data(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    offset = 1e4 if name == "far from zero" else 1.0
    steps = [torch.randn(5, *shape, dtype=torch.float64) + offset for _ in range(2)]
    return layer, steps, torch.randn(5, *shape, dtype=torch.float64)


def train(layer, steps, cotangent):
    """What a layer gives and learns in two steps, the second one with gradients."""
    layer(steps[0])
    inputs = steps[1].clone().requires_grad_()
    output = layer(inputs)
    (output * cotangent).sum().backward()
    found = {"output": output.detach(), "inputs.grad": inputs.grad}
    found.update({f"{name}.grad": p.grad for name, p in layer.named_parameters()})
    found.update({name: b.clone() for name, b in layer.named_buffers()})
    found["eval"] = layer.eval()(steps[0]).detach() if layer.track_running_stats else output
    return found


def of_this_process(name, parts):
    layer, steps, cotangent = layer_and_data(name)
    first, last = PARTS[parts][distributed.rank()]
    own = [data[first:last] for data in (*steps, cotangent)]
    idle = parts == "one is idle" and distributed.rank() == 1
    with synchronized([nn.Sequential(layer)]):
        if idle:
            with uncounted():
                return train(layer, own[:2], own[2] * 0)
        return train(layer, own[:2], own[2])


def main(folder):
    """Compute every case and leave it in a file a process."""
    distributed.join(CPU)
    found = {(n, p): of_this_process(n, p) for n in LAYERS for p in PARTS}
    torch.save(found, folder / f"{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_processes(__file__, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_normalize_and_learn_as_one_on_the_whole_batch(two_processes, name, parts):
    expected = train(*layer_and_data(name))
    found = [process[name, parts] for process in two_processes]
    exact = {"rtol": 1e-9, "atol": 1e-9}
    for key in ("output", "inputs.grad"):
        own = [part[key] for part in found] if parts == "both" else [found[0][key]]
        torch.testing.assert_close(torch.cat(own), expected[key], **exact)
    for key in {"weight.grad", "bias.grad"} & set(expected):
        summed = found[0][key] + found[1][key]
        torch.testing.assert_close(summed, expected[key], **exact)
    for key in {"running_mean", "running_var", "num_batches_tracked"} & set(expected):
        for part in found:
            torch.testing.assert_close(part[key], expected[key], **exact)


def test_alone_a_layer_is_left_as_it_is():
    layer = nn.BatchNorm1d(3)
    with synchronized([layer]):
        assert "forward" not in vars(layer)


def test_a_layers_own_forward_is_given_back_even_after_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    layer = nn.BatchNorm1d(3)
    with synchronized([nn.Sequential(layer), layer]):
        assert "forward" in vars(layer)
        assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    assert "forward" not in vars(layer)
    with pytest.raises(RuntimeError), synchronized([layer]):
        layer.load_state_dict({})
    assert "forward" not in vars(layer)


def test_in_eval_mode_a_layer_uses_its_own_statistics_without_asking_anyone(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    layer = nn.BatchNorm1d(3).eval()
    inputs = torch.randn(2, 3)
    expected = layer(inputs)
    with synchronized([layer]):
        assert torch.equal(layer(inputs), expected)


def test_a_layer_may_be_called_by_the_name_of_its_argument(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    layer, inputs = nn.BatchNorm1d(3).eval(), torch.randn(2, 3)
    expected = layer(input=inputs)
    with synchronized([layer]):
        assert torch.equal(layer(input=inputs), expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
