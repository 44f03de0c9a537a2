import copy
import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import Batch, NumericalError, randomness
from distill.builtin.torch_components import CrossEntropyLoss
from distill.data.loader import Loading, training_batches
from distill.data.mixing import Mixing
from distill.data.plan import Plan
from distill.data.source import Source
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call
from distill.testing import ToyData, ToyMLP
from distill.training.loop import Loop
from distill.training.non_finite import NonFinite
from distill.training.optimizer import Optimization
from distill.training.sync_batchnorm import _COUNTED

CPU = torch.device("cpu")
DATA = ToyData(20)
PLAN = Plan(20, 8)


class Losing(nn.Module):
    """Gives the losses it is told to, batch by batch; one not finite has such a gradient."""

    def __init__(self, *losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = list(losses)

    def forward(self, batch):
        loss = self.losses.pop(0) * (1 + 0 * self.weight)
        return {"ce": loss, "total": loss * 2}


class Drawing(Losing):
    """Notes what it draws."""

    def __init__(self):
        super().__init__(*[1.0] * 99)
        self.drawn = []

    def forward(self, batch):
        self.drawn.append(torch.rand(1).item())
        return super().forward(batch)


class Steep(nn.Module):
    """Its losses are finite, and their gradients are what it is told to give."""

    def __init__(self, *gradients):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.gradients = list(gradients)

    def forward(self, batch):
        gradient = torch.tensor(float(self.gradients.pop(0)))
        loss = GradientOf.apply(self.weight, gradient)
        return {"ce": loss, "total": loss}


class GradientOf(torch.autograd.Function):
    """0 with the gradient it is told to have."""

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.save_for_backward(gradient)
        return torch.zeros(())

    @staticmethod
    def backward(ctx, given):
        return given * ctx.saved_tensors[0], None


def distiller_of(student):
    term = Call(
        "ce",
        CrossEntropyLoss(),
        {"student": Address("student", "student"), "targets": Address("targets", "targets")},
    )
    return Distiller(student, {}, (), Criterion([term], {"ce": 1.0}))


def loop_of(module, lr=0.1, log_every=50, scaler=None, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    optimization = Optimization(optimizer, scaler=scaler)
    return Loop(module, optimization, CPU, 7, "kd", log_every, **options)


def batches(epoch=0, workers=0, plan=PLAN):
    loading = Loading(workers=workers)
    return training_batches(Source("toy", DATA), plan, loading, seed=7, epoch=epoch)


def plain_batches(count, size=4, accumulate=1):
    for number in range(count):
        ends = (number + 1) % accumulate == 0 or number + 1 == count
        yield Batch(torch.zeros(size, 4), None, torch.arange(size), ends_step=ends)


def test_training_equals_a_hand_written_loop_to_the_bit():
    torch.manual_seed(0)
    student = ToyMLP(dropout=0.5)
    by_hand = copy.deepcopy(student)
    loop = loop_of(distiller_of(student))
    for epoch in range(3):
        loop.epoch(batches(epoch), epoch=epoch, first_step=epoch * PLAN.steps)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    step = 0
    for epoch in range(3):
        for number, chosen in enumerate(PLAN.draw(7, epoch)):
            torch.manual_seed(randomness.derive(7, "step", "kd", 0, epoch) + number)
            optimizer.zero_grad()
            logits = by_hand(DATA.inputs[chosen])
            F.cross_entropy(logits, torch.tensor([DATA.labels[i] for i in chosen])).backward()
            optimizer.step()
            step += 1
    assert step == 9
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_batches_of_a_step_weigh_as_one_batch_of_all_its_samples(accumulate):
    torch.manual_seed(0)
    student = ToyMLP()
    by_hand = copy.deepcopy(student)
    plan = Plan(20, 3, accumulate=accumulate)
    loop = loop_of(distiller_of(student))
    for epoch in range(2):
        loop.epoch(batches(epoch, plan=plan), epoch=epoch, first_step=epoch * plan.steps)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        drawn = plan.draw(7, epoch)
        for first in range(0, len(drawn), accumulate):
            chosen = [i for batch in drawn[first : first + accumulate] for i in batch]
            optimizer.zero_grad()
            logits = by_hand(DATA.inputs[chosen])
            F.cross_entropy(logits, torch.tensor([DATA.labels[i] for i in chosen])).backward()
            optimizer.step()
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_number_of_workers_does_not_change_what_a_step_draws():
    drawn = []
    for workers in (0, 2):
        module = Drawing()
        loop_of(module).epoch(batches(workers=workers))
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == PLAN.steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_two_batches_of_a_stage_draw_the_same(accumulate):
    plan, module = Plan(20, 4, accumulate=accumulate), Drawing()
    loop = loop_of(module)
    for epoch in range(3):
        loop.epoch(batches(epoch, plan=plan), epoch=epoch, first_step=epoch * plan.steps)
    assert len(module.drawn) == 15
    assert len(set(module.drawn)) == 15


def test_an_epoch_gives_the_mean_of_every_loss_over_its_samples():
    summary = loop_of(Losing(1.0, 2.0, 6.0)).epoch(batches())
    assert summary.samples == 20
    mean = (8 * 1.0 + 8 * 2.0 + 4 * 6.0) / 20
    assert summary.losses == pytest.approx({"ce": mean, "total": 2 * mean})
    assert summary.seconds > 0
    assert (summary.skipped, summary.overflows) == ({}, 0)


def test_log_lines_come_every_so_many_steps_with_means_since_the_last():
    lines = []
    loop = loop_of(Losing(1.0, 3.0, 5.0, 7.0, 9.0), log_every=2)
    summary = loop.epoch(plain_batches(5), on_log=lines.append)
    assert [(line.step, line.losses["ce"]) for line in lines] == [(2, 2.0), (4, 6.0)]
    assert all(line.samples_per_second > 0 for line in lines)
    assert summary.losses["ce"] == pytest.approx(5.0)


def test_what_is_counted_is_steps_however_many_batches_they_have():
    lines, after = [], []
    loop = loop_of(Losing(*map(float, range(7))), log_every=2)
    loop.epoch(
        plain_batches(7, accumulate=2),
        first_step=10,
        on_log=lines.append,
        after_step=lambda *told: after.append(told),
    )
    assert after == [(11, True), (12, True), (13, True), (14, True)]
    assert [(line.step, line.losses["ce"]) for line in lines] == [(2, 1.5), (4, 5.0)]


def test_gradients_are_held_back_until_the_last_batch_of_a_step():
    held, seen = [], []

    @contextmanager
    def hold():
        held.append(True)
        yield
        held.pop()

    class Watching(Losing):
        def forward(self, batch):
            seen.append((batch.ends_step, bool(held)))
            return super().forward(batch)

    loop = loop_of(Watching(*[1.0] * 5), hold=hold)
    loop.epoch(plain_batches(5, accumulate=2))
    assert seen == [(False, True), (True, False)] * 2 + [(True, False)]


def test_batches_are_mixed_before_the_module_sees_them():
    seen = []

    class Watching(Losing):
        def forward(self, batch):
            seen.append((batch.inputs[0, 0].item(), torch.rand(()).item()))
            return super().forward(batch)

    def shift(inputs, targets):
        return inputs + 1 + torch.rand(()), targets

    for epoch in (0, 0, 1):
        loop = loop_of(Watching(1.0, 1.0), mixing=Mixing([shift], 7))
        loop.epoch(plain_batches(2), epoch=epoch)
    plain = Drawing()
    loop_of(plain).epoch(plain_batches(2))
    first, again, other = seen[:2], seen[2:4], seen[4:]
    assert all(1 <= value < 2 for value, _ in seen)
    assert first == again
    assert len({value for value, _ in (*first, *other)}) == 4
    # What the models draw does not depend on what was drawn to mix.
    assert [drawn for _, drawn in first] == plain.drawn


def test_images_are_given_in_the_memory_format_asked_for():
    seen = []

    class Watching(Losing):
        def forward(self, batch):
            seen.append(batch.inputs.is_contiguous(memory_format=torch.channels_last))
            return super().forward(batch)

    image = Batch(torch.rand(2, 3, 4, 4), None, torch.arange(2))
    loop_of(Watching(1.0), memory_format=torch.channels_last).epoch(iter([image]))
    assert seen == [True]


def test_the_module_is_put_in_train_mode():
    module = distiller_of(ToyMLP(dropout=0.5)).eval()
    loop_of(module).epoch(batches())
    assert module.student.dropout.training


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("log_every", [1, 2, 50])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it(bad, log_every):
    module = Losing(1.0, 1.0, bad, 1.0)
    loop, after = loop_of(module, log_every=log_every), []
    before = module.weight.detach().clone()
    with pytest.raises(NonFinite) as caught:
        loop.epoch(plain_batches(4), first_step=10, after_step=lambda *told: after.append(told))
    assert caught.value.step == 13
    assert str(caught.value) == "the gradient of step 13 is not finite"
    (batch,) = caught.value.seen
    assert batch.index.tolist() == [0, 1, 2, 3]
    assert not math.isfinite(batch.losses["ce"].item())
    assert after == [(11, True), (12, True)]
    assert torch.equal(module.weight, before)
    assert module.losses == [1.0]


def test_a_step_of_several_batches_shows_all_of_them_once_one_is_not_finite():
    module = Losing(1.0, 2.0, 3.0, math.nan, 5.0, 6.0)
    with pytest.raises(NonFinite) as caught:
        loop_of(module).epoch(plain_batches(6, accumulate=3))
    assert caught.value.step == 2
    losses = [batch.losses["ce"].item() for batch in caught.value.seen]
    assert math.isnan(losses[0])
    assert losses[1:] == [5.0, 6.0]


def test_a_gradient_that_is_not_finite_stops_before_the_step_though_losses_are():
    module = Steep(1.0, math.inf, 1.0)
    with pytest.raises(NonFinite) as caught:
        loop_of(module, lr=0.5).epoch(plain_batches(3))
    assert caught.value.step == 2
    assert module.weight.item() == -0.5


def test_a_loss_that_is_not_finite_though_its_gradient_is_ends_the_run_at_the_log_line():
    class Detached(Losing):
        def forward(self, batch):
            loss = self.losses.pop(0)
            return {"ce": torch.tensor(loss), "total": self.weight * 1.0}

    with pytest.raises(
        NumericalError,
        match=r"stage 'kd': the loss 'ce' became nan by step 12, though its gradients are finite",
    ):
        loop_of(Detached(1.0, math.nan, 1.0), log_every=2).epoch(plain_batches(3), first_step=10)


def test_divergence_of_a_real_model_is_noticed_while_its_weights_are_finite():
    module = distiller_of(ToyMLP())
    endless = (batch for epoch in itertools.count() for batch in batches(epoch))
    with pytest.raises((NonFinite, NumericalError)):
        loop_of(module, lr=1e30).epoch(endless)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_in_fp16_an_overflow_is_left_out_and_counted():
    module = Steep(1.0, math.inf, 1.0)
    loop, after = loop_of(module, lr=0.5, scaler=torch.amp.GradScaler("cpu")), []
    summary = loop.epoch(plain_batches(3), after_step=lambda *told: after.append(told))
    assert after == [(1, True), (2, False), (3, True)]
    assert summary.overflows == 1
    assert summary.samples == 12
    assert module.weight.item() == pytest.approx(-0.5 - 0.5 * 1.9)


def test_in_fp16_a_loss_that_is_not_finite_is_no_overflow():
    loop = loop_of(Losing(1.0, math.inf), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFinite):
        loop.epoch(plain_batches(2))


def test_in_fp16_what_overflows_forever_ends_the_run():
    loop = loop_of(Steep(*[math.inf] * 99), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFinite) as caught:
        loop.epoch(plain_batches(99))
    assert caught.value.step == 27  # from a scale of 2**16 to below 2**-10


def test_what_could_not_be_read_is_told():
    index = torch.arange(2)
    skipping = [
        Batch(torch.zeros(2, 4), None, index, skipped=[(4, "torn")]),
        Batch(torch.zeros(2, 4), None, index),
        Batch(torch.zeros(2, 4), None, index, skipped=[(9, "lost"), (3, "torn")]),
    ]
    summary = loop_of(Losing(1.0, 1.0, 1.0)).epoch(iter(skipping))
    assert summary.skipped == {4: "torn", 9: "lost", 3: "torn"}


def test_the_share_of_a_process_weighs_its_loss_and_not_what_it_reports():
    module = distiller_of(ToyMLP())
    before = copy.deepcopy(module.student)
    loop = loop_of(module, lr=1.0)
    (whole, *_) = batches()
    halved = Batch(whole.inputs, whole.targets, whole.index, share=0.5)
    summary = loop.epoch(iter([halved]))
    loss = F.cross_entropy(before(whole.inputs), whole.targets)
    loss.backward()
    assert summary.losses["ce"] == pytest.approx(loss.item())
    for ours, theirs in zip(module.student.parameters(), before.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.5 * theirs.grad)


def test_a_sample_that_only_keeps_step_with_the_others_changes_and_counts_nothing():
    module = distiller_of(ToyMLP())
    before = copy.deepcopy(module.student.state_dict())
    (whole, *_) = batches()
    idle = Batch(whole.inputs, whole.targets, whole.index, share=0.0)
    summary = loop_of(module, lr=1.0).epoch(iter([idle, whole]))
    assert summary.samples == len(whole)
    alone = distiller_of(ToyMLP())
    alone.student.load_state_dict(before)
    loop_of(alone, lr=1.0).epoch(iter([whole]))
    for ours, theirs in zip(module.student.parameters(), alone.student.parameters(), strict=True):
        assert torch.allclose(ours, theirs)


def test_a_sample_that_only_keeps_step_is_left_out_of_statistics():
    seen = []

    class Watching(Losing):
        def forward(self, batch):
            seen.append((batch.share, _COUNTED.get()))
            return super().forward(batch)

    shares = [0.0, 1.0, 0.0]
    index = torch.arange(1)
    given = (Batch(torch.zeros(1, 4), None, index, share=s, ends_step=s == 1) for s in shares)
    loop_of(Watching(1.0, 1.0, 1.0)).epoch(given)
    assert seen == [(0.0, False), (1.0, True), (0.0, False)]


def test_an_epoch_without_batches_has_no_losses():
    summary = loop_of(Losing()).epoch(iter([]))
    assert summary.losses == {}
    assert summary.samples == 0
