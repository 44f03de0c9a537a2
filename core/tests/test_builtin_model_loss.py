from collections import OrderedDict

import pytest
import torch

from distill import builtin
from distill.builtin.model_loss import ModelLoss


def test_it_is_on_offer():
    assert builtin.distill_losses()["ModelLoss"] is ModelLoss


def test_a_scalar_is_returned_as_it_is():
    loss = torch.tensor(2.5)
    assert ModelLoss()(student=loss) is loss


@pytest.mark.parametrize(
    "output",
    [
        {"box": torch.tensor(1.0), "class": torch.tensor(2.5)},
        OrderedDict(box=torch.tensor(1.0), rest={"a": torch.tensor(2.0), "b": torch.tensor(0.5)}),
        [torch.tensor(3.0), torch.tensor(0.5)],
        (torch.tensor(3.0), {"a": [torch.tensor(0.5)]}),
    ],
)
def test_the_scalars_of_what_a_model_returns_are_added_up(output):
    assert ModelLoss()(output).item() == 3.5


def test_the_gradient_reaches_every_loss_once():
    weight = torch.ones(3, requires_grad=True)
    one, two, three = weight.unbind()
    ModelLoss()({"a": 2 * one, "b": {"c": 3 * two, "d": [5 * three]}}).backward()
    assert weight.grad.tolist() == [2, 3, 5]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.ones(3), r"got a tensor \(3,\) of torch.float32$"),
        (torch.tensor(3), r"got a tensor \(\) of torch.int64$"),
        ({"box": torch.tensor(1.0), "scores": torch.ones(1)}, r"\(1,\) of .* as 'scores'$"),
        ({"a": {"b": [torch.tensor(1.0), 2.0]}}, "got a value of type float as 'a.b.1'$"),
        ({"loss": None}, "got a value of type NoneType as 'loss'$"),
        (None, "got a value of type NoneType$"),
        ({}, "got an empty dict: no loss in it$"),
        ([[], {}], "got an empty list"),
    ],
)
def test_anything_else_is_an_error_in_words(output, said):
    with pytest.raises(ValueError, match=said):
        ModelLoss()(output)
