"""One module over many processes; this file is also what those processes run."""

import copy

import torch
from torch import nn

from distill import Batch, distributed
from distill.builtin.torch_components import CrossEntropyLoss
from distill.data.loader import training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.model.criterion import TOTAL, Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call
from distill.testing import ToyConvNet, ToyData, ToyMLP, run_processes
from distill.training.parallel import averaged_over_ranks
from distill.training.traceless import buffers_kept

CPU = torch.device("cpu")
DATA = ToyData(10)
PLAN = Plan(10, 3, accumulate=2)  # two processes get 1 and 2 samples, and of the last batch 0 and 1


class Losing(nn.Module):
    """Gives a loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"total": self.weight * 2}


class Partly(nn.Module):
    """Has a layer that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.used = ToyMLP()
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.used(inputs)


def distiller_of(student):
    term = Call(
        "ce",
        CrossEntropyLoss(),
        {"student": Address("student", "student"), "targets": Address("targets", "targets")},
    )
    return Distiller(student, {}, (), Criterion([term], {"ce": 1.0}))


def first_batch():
    return Batch(DATA.inputs[:2], torch.tensor(DATA.labels[:2]), torch.arange(2))


def student_of(cls):
    torch.manual_seed(0)
    return cls()


def test_alone_a_module_is_not_wrapped_nor_called():
    module = Losing()
    batch = Batch(torch.zeros(4, 4), None, torch.arange(4))
    parallel = averaged_over_ranks(module, batch, leaves_unused=False)
    assert parallel.module is module
    assert module.weight.grad is None
    with parallel.hold():
        module(batch)[TOTAL].backward()
    assert module.weight.grad == 2.0
    assert distributed.world_size() == 1


def test_processes_work_together():
    run_processes(__file__)


def gradients(cls=ToyMLP, leaves_unused=False):
    """The gradient of a step is that of the mean over all its samples, on every process."""
    module = distiller_of(student_of(cls))
    parallel = averaged_over_ranks(module, first_batch(), leaves_unused=leaves_unused)
    alone = student_of(cls)
    source, step, done = Source("d", DATA), [], 0
    whole = PLAN.draw(1, 0)
    parts = training_batches(source, PLAN, seed=1, epoch=0)
    for number, batch in enumerate(parts):
        step += whole[number]
        if not batch.ends_step:
            with parallel.hold():
                (parallel.module(batch)[TOTAL] * batch.share).backward()
            continue
        (parallel.module(batch)[TOTAL] * batch.share).backward()
        logits = alone(DATA.inputs[step])
        nn.functional.cross_entropy(logits, torch.tensor([DATA.labels[i] for i in step])).backward()
        compare(module.student, alone)
        module.zero_grad(set_to_none=True)
        alone.zero_grad(set_to_none=True)
        step, done = [], done + 1
    assert done == PLAN.steps == 2


def compare(ours, theirs):
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if right.grad is None:
            assert left.grad is None or not left.grad.any(), name
            continue
        torch.testing.assert_close(left.grad, right.grad)
        of_ranks = distributed.gather_objects(left.grad.tolist())
        assert all(other == of_ranks[0] for other in of_ranks), name


def unused():
    """Parameters without a gradient keep nobody waiting."""
    gradients(Partly, leaves_unused=True)


def traces():
    """What is run through first leaves neither gradients nor statistics."""
    module = distiller_of(student_of(ToyConvNet))
    before = copy.deepcopy(module.state_dict())
    images = ToyData(2, shape=(1, 4, 4)).inputs
    batch = Batch(images, torch.tensor([0, 1]), torch.arange(2))
    parallel = averaged_over_ranks(module, batch, leaves_unused=False)
    assert parallel.module is not module
    assert all(p.grad is None for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    with buffers_kept(module):
        parallel.module(batch)[TOTAL].backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join(CPU)
    gradients()
    unused()
    traces()
