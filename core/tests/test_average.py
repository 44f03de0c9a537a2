"""An exponential moving average of a model's weights."""

import copy

import pytest
import torch

from distill.config.experiment import EMA
from distill.testing import ToyConvNet
from distill.training.average import Average


def followed(settings, steps=5):
    """A model that changes, its average, and the states that it went through."""
    torch.manual_seed(0)
    model = ToyConvNet()
    average, states = Average(copy.deepcopy(model), settings), [copy.deepcopy(model.state_dict())]
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 1, 3, 3))
        average.update(model)
        states.append(copy.deepcopy(model.state_dict()))
    return model, average, states


@pytest.mark.parametrize(
    ("settings", "decays"),
    [
        (EMA(0.9, warmup=False), [0.9] * 5),
        (EMA(0.9, warmup=True), [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]),
        (EMA(0.3, warmup=True), [2 / 11, 3 / 12, 0.3, 0.3, 0.3]),
        (EMA(0.0, warmup=False), [0.0] * 5),
    ],
)
def test_it_is_that_of_the_formula_running_statistics_included(settings, decays):
    _, average, (expected, *states) = followed(settings)
    for state, decay in zip(states, decays, strict=True):
        for name, value in state.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert average.model.norm.num_batches_tracked == 5
    assert average.updates == 5


def test_it_is_not_trained():
    model, average, _ = followed(EMA(0.9, warmup=False))
    assert not any(p.requires_grad for p in average.model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_it_goes_on_from_a_saved_state():
    model, average, _ = followed(EMA(0.9, warmup=True))
    again = Average(ToyConvNet(), EMA(0.9, warmup=True))
    again.load_state_dict(copy.deepcopy(average.state_dict()))
    assert again.decay == average.decay
    for one in (average, again):
        one.update(model)
    for name, value in average.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
