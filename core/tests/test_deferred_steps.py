"""Steps whose gradient is judged later, so that nobody waits for the device in between."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill import Batch
from distill.config.experiment import Clip
from distill.model.criterion import Criterion
from distill.model.wiring import Call
from distill.training.loop import Loop
from distill.training.non_finite import LAG, NonFinite
from distill.training.optimizer import Optimization, begin_momentum
from distill.training.split_gradients import Split

CPU = torch.device("cpu")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}
FUSED = [name for name in OPTIMIZERS if name.startswith("fused")]
CLIPS = [Clip(), Clip(norm=0.5), Clip(value=0.1), Clip(norm=0.7, value=0.1)]


class Apart(torch.optim.SGD):
    """Follows what it takes apart half as fast."""

    takes_apart = "terms"
    gradients_apart: dict = {}  # noqa: RUF012

    def step(self, closure=None):
        for p, gradient in self.gradients_apart.items():
            p.data.sub_(gradient, alpha=0.05)
        super().step(closure)


class HostWaits(TorchDispatchMode):
    """Notes whatever reads a number from the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._local_scalar_dense:
            self.found.append(function)
        return function(*args, **(kwargs or {}))


class Given(nn.Module):
    """Gives finite losses whose gradients are what it is told."""

    def __init__(self, *gradients, losses=()):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.gradients, self.losses = list(gradients), list(losses) or [0.0] * len(gradients)

    def forward(self, batch):
        wanted = torch.tensor(self.gradients.pop(0))
        loss = (self.weight - self.weight.detach()).clone()
        loss.register_hook(lambda gradient: gradient * wanted)
        return {"total": loss + self.losses.pop(0)}


def optimization_of(parameters, name, defers, **options):
    optimizer = OPTIMIZERS[name](parameters)
    begin_momentum(optimizer)
    return Optimization(optimizer, defers=defers, leaves_out=name in FUSED, **options)


def parameters_of(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]


def follow(optimization, parameters, factor=1.0, steps=1):
    for number in range(steps):
        loss = sum(((p - number) ** 3).sum() for p in parameters) * factor
        optimization.backward(loss)
        outcome = optimization.step()
    return outcome


def trained(name, defers, clip, steps=4):
    parameters = parameters_of()
    optimization = optimization_of(parameters, name, defers, clip=clip)
    follow(optimization, parameters, steps=steps)
    return parameters


def batches(count):
    for number in range(count):
        yield Batch(torch.zeros(4, 1), None, torch.arange(4) + 4 * number)


def loop_of(module, name, scaler=None, **options):
    optimization = optimization_of(module.parameters(), name, True, scaler=scaler)
    return Loop(module, optimization, CPU, 7, "kd", **options)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_judged_later_trains_the_same_to_the_bit(name, clip):
    pairs = zip(trained(name, True, clip), trained(name, False, clip), strict=True)
    assert all(torch.equal(later, at_once) for later, at_once in pairs)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_gradients_taken_apart_are_followed_the_same_too(clip):
    found = []
    for defers in (True, False):
        parameters = parameters_of()
        optimizer = Apart(parameters, lr=0.1)
        criterion = Criterion([Call(n, nn.Identity(), {}) for n in "ab"], {"a": 1.0, "b": 2.0})
        optimization = Optimization(optimizer, clip=clip, defers=defers)
        optimization.split = Split(optimizer, criterion, ["b"], parameters)
        for _ in range(3):
            losses = {"a": sum(p.square().sum() for p in parameters), "b": parameters[0].sum()}
            optimization.backward_of(losses, 1.0)
            optimization.step()
        found.append(parameters)
    for later, at_once in zip(*found, strict=True):
        torch.testing.assert_close(later, at_once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nobody_waits_for_the_device(name, clip, scaled):
    if scaled and name not in FUSED:
        pytest.skip("a scaler waits itself where the optimizer cannot leave a step out")
    parameters = parameters_of()
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    optimization = optimization_of(parameters, name, True, clip=clip, scaler=scaler)
    follow(optimization, parameters)
    with HostWaits() as waits:
        assert follow(optimization, parameters) == "deferred"
    assert not waits.found


def test_one_who_waits_is_noticed():
    parameters = parameters_of()
    with HostWaits() as waits:
        follow(optimization_of(parameters, "SGD", False), parameters)
    assert waits.found


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    ("bad", "clip"),
    [
        (math.nan, Clip()),
        (math.inf, Clip()),
        (math.nan, Clip(norm=1.0)),  # found twice: in an element and in the norm
        (1e30, Clip(norm=1.0)),  # whose norm alone is infinite
        (math.nan, Clip(value=1.0)),
    ],
)
def test_a_fused_optimizer_leaves_out_what_is_not_finite(name, bad, clip):
    parameters = parameters_of()
    optimization = optimization_of(parameters, name, True, clip=clip)
    follow(optimization, parameters)
    before = [p.detach().clone() for p in parameters]
    follow(optimization, parameters, factor=bad)
    assert optimization.verdict[0] > 0
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    follow(optimization, parameters)
    assert optimization.verdict[0] == 0
    assert all(torch.isfinite(p).all() for p in parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("log_every", [1, 2, 50])
def test_the_step_is_named_within_few_others_and_before_anything_is_read(name, log_every):
    module, told = Given(1.0, 1.0, math.inf, *[1.0] * 9), []
    loop = loop_of(module, name, log_every=log_every)
    with pytest.raises(NonFinite) as caught:
        loop.epoch(batches(12), after_step=lambda step, followed: told.append(step))
    assert caught.value.step == 3
    assert caught.value.late
    assert caught.value.seen[0].index.tolist() == [8, 9, 10, 11]
    assert len(told) <= 2 + LAG


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_epoch_does_not_end_before_its_last_steps_are_judged(name):
    with pytest.raises(NonFinite) as caught:
        loop_of(Given(1.0, math.nan), name).epoch(batches(2))
    assert caught.value.step == 2


@pytest.mark.parametrize("name", FUSED)
def test_in_fp16_an_overflow_is_left_out_and_counted(name):
    module = Given(1.0, math.inf, 1.0)
    summary = loop_of(module, name, torch.amp.GradScaler("cpu")).epoch(batches(3))
    plain = Given(1.0, 1.0)
    loop_of(plain, name).epoch(batches(2))
    assert summary.overflows == 1
    assert torch.equal(module.weight, plain.weight)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("defers", [True, False])
def test_an_overflow_in_the_very_first_step_leaves_nothing_behind(name, defers):
    torch.empty(10**6).fill_(1e30)  # what uninitialised memory may be
    module, plain = Given(math.inf, math.inf, 1.0, 1.0), Given(1.0, 1.0)
    for one, count in ((module, 4), (plain, 2)):
        optimization = optimization_of(
            one.parameters(), name, defers, scaler=torch.amp.GradScaler("cpu")
        )
        Loop(one, optimization, CPU, 7, "kd").epoch(batches(count))
    assert torch.equal(module.weight, plain.weight)


def test_with_fused_momentum_a_parameter_may_have_its_first_gradient_later():
    found = []
    for name in ("SGD", "fused SGD"):
        parameters = parameters_of()
        optimization = optimization_of(parameters, name, True)
        for number in range(1, 3):
            follow(optimization, parameters[:number])
        found.append(parameters)
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("name", FUSED)
def test_in_fp16_an_infinite_norm_of_finite_elements_is_no_overflow(name):
    parameters = parameters_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimization = optimization_of(parameters, name, True, clip=Clip(norm=1.0), scaler=scaler)
    follow(optimization, parameters, factor=1e30)
    found, scale = optimization.verdict.tolist()
    assert found > 0
    assert scale == 0


def test_in_fp16_a_loss_that_is_not_finite_is_no_overflow():
    module = Given(1.0, math.inf, 1.0, losses=[0.0, math.nan, 0.0])
    with pytest.raises(NonFinite) as caught:
        loop_of(module, "fused SGD", torch.amp.GradScaler("cpu")).epoch(batches(3))
    assert caught.value.step == 2


def test_in_fp16_what_overflows_forever_ends_the_run():
    loop = loop_of(Given(*[math.inf] * 99), "fused SGD", torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFinite) as caught:
        loop.epoch(batches(99))
    assert caught.value.step == 27  # from a scale of 2**16 to below 2**-10
