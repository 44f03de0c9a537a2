import pytest
import torch
from torch import nn

from distill.builtin.torch_components import CrossEntropyLoss
from distill.model.criterion import Criterion
from distill.model.wiring import Address, Call
from distill.testing import LossConformance
from distill.weight_schedule import WeightSchedule

VALUES = {"x": torch.tensor([1.0, 3.0]), "y": torch.tensor([0.0, 0.0])}


def term(name, module, **addresses):
    return Call(name, module, {n: Address(a, a) for n, a in addresses.items()})


class TestCrossEntropyLoss(LossConformance):
    def make(self):
        return CrossEntropyLoss()

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "targets": torch.randint(5, (batch,))}


def test_total_is_the_weighted_sum_and_terms_are_reported_unweighted():
    criterion = Criterion(
        [
            term("mse", nn.MSELoss(), input="x", target="y"),
            term("l1", nn.L1Loss(), input="x", target="y"),
        ],
        {"mse": 0.5, "l1": 3.0},
    )
    losses = criterion(VALUES)
    assert {name: loss.item() for name, loss in losses.items()} == {
        "mse": 5.0,
        "l1": 2.0,
        "total": 8.5,
    }


@pytest.mark.parametrize("weight", [1.0, 0.0, -2.0])
def test_gradient_of_the_total_is_weighted(weight):
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    criterion = Criterion([term("l1", nn.L1Loss(), input="x", target="y")], {"l1": weight})
    criterion({"x": x, "y": VALUES["y"]})["total"].backward()
    assert x.grad.tolist() == [0.5 * weight, 0.5 * weight]


def test_parameters_of_losses_are_the_criterions():
    loss = nn.Module()
    loss.scale = nn.Parameter(torch.ones(1))
    criterion = Criterion([term("a", loss)], {"a": 1.0})
    assert [p is loss.scale for p in criterion.parameters()] == [True]


def test_weights_that_change_are_those_of_the_position():
    terms = [
        term("mse", nn.MSELoss(), input="x", target="y"),
        term("l1", nn.L1Loss(), input="x", target="y"),
    ]
    ramp = WeightSchedule(over=4, unit="steps")
    criterion = Criterion(terms, {"mse": ramp, "l1": 3.0})
    assert criterion.is_scheduled
    assert criterion.weights == {"mse": 0.25, "l1": 3.0}
    criterion.set_position(0, 2)
    assert criterion.weights == {"mse": 0.75, "l1": 3.0}
    assert criterion(VALUES)["total"].item() == 0.75 * 5.0 + 3.0 * 2.0
    assert not Criterion(terms, {"mse": 1.0, "l1": 1.0}).is_scheduled
