"""An exponential moving average of a model's weights."""

import copy

import pytest
import torch
from torch import nn

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


class Counted(nn.Module):
    """A weight, a frozen weight, a running value, a counter, a flag, and a weight in half."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.fixed = nn.Parameter(torch.tensor([5.0]), requires_grad=False)
        self.narrow = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
        self.register_buffer("running", torch.tensor([0.0], dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("passing", torch.tensor([4.0]), persistent=False)


def test_by_hand_floats_follow_slowly_and_whole_numbers_at_once():
    model = Counted()
    average = Average(copy.deepcopy(model), EMA(0.75, warmup=False))
    for step in (1, 2):
        with torch.no_grad():
            model.weight += 4.0
            model.narrow += 4.0
            model.running += 8.0
            model.passing += 4.0
            model.seen += 3
            model.flag.fill_(step == 1)
        average.update(model)
        assert average.model.seen == 3 * step
        assert average.model.flag.item() is (step == 1)
    # 0.75 * (0.75 * x + 0.25 * (x + d)) + 0.25 * (x + 2 d) = x + 0.6875 d
    assert average.model.weight.tolist() == [1 + 0.6875 * 4, 2 + 0.6875 * 4]
    assert average.model.narrow.item() == 1 + 0.6875 * 4
    assert average.model.narrow.dtype == torch.bfloat16
    assert average.model.running.item() == 0.6875 * 8
    assert average.model.passing.item() == 4 + 0.6875 * 4
    assert average.model.fixed.item() == 5.0
    assert model.weight.tolist() == [9.0, 10.0]


def test_warm_up_follows_the_formula_and_ends_at_the_decay():
    model = Counted()
    average = Average(copy.deepcopy(model), EMA(0.9, warmup=True))
    seen = []
    for _ in range(100):
        seen.append(average.decay)
        average.update(model)
    assert seen == [min(0.9, (1 + n) / (10 + n)) for n in range(1, 101)]
    assert seen[78] < 0.9 == seen[80]
