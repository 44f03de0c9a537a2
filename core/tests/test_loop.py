import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import Batch, NumericalError, distributed, randomness
from distill.builtin.torch_components import CrossEntropyLoss
from distill.data.loader import Plan, Source, training_batches
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call
from distill.testing import ToyConvNet, ToyData, ToyMLP
from distill.training.loop import Loop, buffers_kept, distributed_over_ranks
from distill.training.optimizer import Optimization

CPU = torch.device("cpu")
DATA = ToyData(20)
PLAN = Plan(20, 8)


class Losing(nn.Module):
    """Gives the losses it is told to, step by step."""

    def __init__(self, *losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = list(losses)

    def forward(self, batch):
        loss = self.losses.pop(0) + 0 * self.weight
        return {"ce": loss, "total": loss * 2}


class Drawing(Losing):
    """Notes what it draws."""

    def __init__(self):
        super().__init__(*[1.0] * 99)
        self.drawn = []

    def forward(self, batch):
        self.drawn.append(torch.rand(1).item())
        return super().forward(batch)


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


def distiller_of(student):
    term = Call(
        "ce",
        CrossEntropyLoss(),
        {"student": Address("student", "student"), "targets": Address("targets", "targets")},
    )
    return Distiller(student, {}, (), Criterion([term], {"ce": 1.0}))


def loop_of(module, lr=0.1, log_every=50):
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    return Loop(module, Optimization(optimizer, None, None), CPU, 7, "kd", log_every)


def batches(epoch=0, workers=0):
    return training_batches(Source("toy", DATA), PLAN, seed=7, epoch=epoch, workers=workers)


def plain_batches(count, size=4):
    for _ in range(count):
        yield Batch(torch.zeros(size, 4), None, torch.arange(size))


def test_training_equals_a_hand_written_loop_to_the_bit():
    torch.manual_seed(0)
    student = ToyMLP(dropout=0.5)
    by_hand = copy.deepcopy(student)
    loop = loop_of(distiller_of(student))
    for epoch in range(3):
        loop.epoch(batches(epoch), first_step=epoch * PLAN.steps)

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    step = 0
    for epoch in range(3):
        order = PLAN.order(7, epoch)
        for start in range(0, 20, 8):
            chosen = order[start : start + 8]
            torch.manual_seed(randomness.derive(7, "step", "kd", 0) + step)
            optimizer.zero_grad()
            logits = by_hand(DATA.inputs[chosen])
            F.cross_entropy(logits, torch.tensor([DATA.labels[i] for i in chosen])).backward()
            optimizer.step()
            step += 1
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_number_of_workers_does_not_change_what_a_step_draws():
    drawn = []
    for workers in (0, 2):
        module = Drawing()
        loop_of(module).epoch(batches(workers=workers))
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == PLAN.steps


def test_an_epoch_gives_the_mean_of_every_loss_over_its_samples():
    summary = loop_of(Losing(1.0, 2.0, 6.0)).epoch(batches())
    assert summary.samples == 20
    mean = (8 * 1.0 + 8 * 2.0 + 4 * 6.0) / 20
    assert summary.losses == pytest.approx({"ce": mean, "total": 2 * mean})
    assert summary.seconds > 0


def test_log_lines_come_every_so_many_steps_with_means_since_the_last():
    lines = []
    loop = loop_of(Losing(1.0, 3.0, 5.0, 7.0, 9.0), log_every=2)
    summary = loop.epoch(plain_batches(5), on_log=lines.append)
    assert [(line.step, line.losses["ce"]) for line in lines] == [(2, 2.0), (4, 6.0)]
    assert all(line.samples_per_second > 0 for line in lines)
    assert summary.losses["ce"] == pytest.approx(5.0)


def test_the_module_is_put_in_train_mode():
    module = distiller_of(ToyMLP(dropout=0.5)).eval()
    loop_of(module).epoch(batches())
    assert module.student.dropout.training


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("log_every", [1, 2, 50])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(bad, log_every):
    loop = loop_of(Losing(1.0, 1.0, bad), log_every=log_every)
    with pytest.raises(NumericalError, match=r"stage 'kd': the loss 'ce' became .* by step 13;"):
        loop.epoch(plain_batches(3), first_step=10)


def test_divergence_of_a_real_model_is_noticed():
    loop = loop_of(distiller_of(ToyMLP()), lr=1e30)
    with pytest.raises(NumericalError):
        loop.epoch(batches())


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


def test_an_epoch_without_batches_has_no_losses():
    summary = loop_of(Losing()).epoch(iter([]))
    assert summary.losses == {}
    assert summary.samples == 0


def test_alone_a_module_is_not_wrapped():
    module = Losing()
    with distributed_over_ranks(module, next(plain_batches(1)), leaves_unused=False) as wrapped:
        assert wrapped is module
    assert distributed.world_size() == 1


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
