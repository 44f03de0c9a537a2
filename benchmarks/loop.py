"""What the loop costs: knowledge distillation by distill and by hand, step against step.

Both sides train the same models on the same batches in memory, a few steps in turn, so that
whatever slows the machine slows both. Printed are medians of the time of a step, their ratio, and
the difference in microseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle, islice
from statistics import median
from time import perf_counter

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from distill.data.batch import Batch
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call
from distill.training.loop import Loop
from distill.training.optimizer import Optimization
from distill_kd import KDLoss

TEMPERATURE, ALPHA = 4.0, 0.5
CLASSES = 10


def by_hand(teacher: nn.Module, student: nn.Module, device: torch.device) -> Callable[..., None]:
    """Return a function that trains on batches as a script of one's own would."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    teacher.eval().requires_grad_(False)

    def train(batches: list[Batch]) -> None:
        student.train()
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            with torch.no_grad():
                expected = teacher(inputs)
            logits = student(inputs)
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1),
                F.softmax(expected / TEMPERATURE, 1),
                reduction="batchmean",
            )
            hard = F.cross_entropy(logits, targets)
            loss = ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return train


def by_distill(teacher: nn.Module, student: nn.Module, device: torch.device) -> Callable[..., None]:
    """Return a function that trains on batches as a stage does."""
    arguments = {name: Address(name, name) for name in ("student", "teacher", "targets")}
    term = Call("kd", KDLoss(temperature=TEMPERATURE, alpha=ALPHA), arguments)
    teacher.eval().requires_grad_(False)
    distiller = Distiller(student, {"teacher": teacher}, [], Criterion([term], {"kd": 1.0}))
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=1e-3, momentum=0.9)
    loop = Loop(distiller, Optimization(optimizer, None, None), device, seed=0, stage="kd")

    def train(batches: list[Batch]) -> None:
        loop.epoch(iter(batches))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return train


def compare(
    make: Callable[[], tuple[nn.Module, nn.Module]],
    batches: list[Batch],
    device: torch.device,
    *,
    turns: int,
    steps: int,
) -> tuple[float, float]:
    """Return the median seconds of a step by hand and by distill, taking turns."""
    sides = []
    for side in (by_hand, by_distill):
        torch.manual_seed(0)
        teacher, student = make()
        sides.append(side(teacher.to(device), student.to(device), device))
    times: list[list[float]] = [[], []]
    endless = cycle(batches)
    for turn in range(turns + 1):
        chosen = list(islice(endless, steps))
        for number in (0, 1) if turn % 2 else (1, 0):
            started = perf_counter()
            sides[number](chosen)
            if turn:  # the first warms up
                times[number].append((perf_counter() - started) / steps)
    return median(times[0]), median(times[1])


def random_batches(count: int, size: int, *shape: int) -> list[Batch]:
    """Return batches of noise with labels."""
    return [
        Batch(torch.randn(size, *shape), torch.randint(CLASSES, (size,)), torch.arange(size))
        for _ in range(count)
    ]


def tiny() -> tuple[nn.Module, nn.Module]:
    """Return a pair so small that a step is all overhead."""
    return nn.Linear(16, CLASSES), nn.Linear(16, CLASSES)


def resnets() -> tuple[nn.Module, nn.Module]:
    """Return ResNet-34 and ResNet-18."""
    models = torchvision.models
    return models.resnet34(num_classes=CLASSES), models.resnet18(num_classes=CLASSES)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=21, help="turns of each side")
    options = parser.parse_args()
    device = torch.device(options.device)
    cases = {
        "ResNet-34 to ResNet-18, 64x64, batch 32": (resnets, (4, 32, 3, 64, 64), 2, options.turns),
        "linear to linear, batch 8": (tiny, (4, 8, 16), 200, 2 * options.turns),
    }
    print("| work | by hand | distill | ratio | difference |")
    print("| ---- | ------: | ------: | ----: | ---------: |")
    for name, (make, shape, steps, turns) in cases.items():
        batches = random_batches(*shape)
        hand, own = compare(make, batches, device, turns=turns, steps=steps)
        print(
            f"| {name} | {hand * 1e3:.3f} ms | {own * 1e3:.3f} ms | {own / hand:.3f} "
            f"| {(own - hand) * 1e6:+.0f} µs |"
        )


if __name__ == "__main__":
    main()
