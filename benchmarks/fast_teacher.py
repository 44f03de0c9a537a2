"""What a fast teacher saves: knowledge distillation from ResNet-34 into ResNet-18 on the CPU.

First the teacher's forward alone: as it is, made fast by hand (BatchNorm folded, channels last,
bf16), and with `fast: true`. Then whole steps, by a hand-written loop and by distill: with the
plain teacher, with the fast one, and with a student in bf16 besides. All take turns on the same
batches in memory, so that whatever slows the machine slows all. Printed are medians, ratios to the
hand-written loop with the plain teacher, and ratios of distill to the loop that does the same.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torchvision
from engine import Train, by_distill
from timing import taking_turns
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from distill.data.batch import Batch
from distill.model.fast import FastTeacher, cast, fold, foldable

TEMPERATURE, ALPHA, CLASSES = 4.0, 0.5, 100
CPU = torch.device("cpu")
LAST = torch.channels_last
Forward = Callable[[torch.Tensor], torch.Tensor]


def teacher_by_hand(teacher: nn.Module) -> Forward:
    """Return the forward of a teacher that is made fast as in a script of one's own."""
    fast = fuse(teacher.eval()).to(memory_format=LAST).bfloat16().requires_grad_(False)

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = fast(images.to(torch.bfloat16, memory_format=LAST))
        return logits.float()

    return forward


def teacher_by_distill(teacher: nn.Module, images: torch.Tensor) -> Forward:
    """Return the forward of a teacher as ``fast: true`` makes it."""
    fast = copy.deepcopy(teacher).eval().requires_grad_(False)
    pairs, _ = foldable(fast, lambda: fast(images[:2]), [])
    fold(fast, pairs)
    cast(fast, torch.bfloat16)
    fast.to(memory_format=LAST)
    form = FastTeacher(fast, None, CPU, CPU, torch.bfloat16, channels_last=True)

    def forward(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = form.back(form(Batch(images, None, torch.arange(len(images)))))
        return logits

    return forward


def by_hand(teacher: Forward, student: nn.Module, *, reduced: bool) -> Train:
    """Return a function that trains a student as a script of one's own would."""
    if reduced:
        student.to(memory_format=LAST)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def train(batches: list[Batch]) -> None:
        student.train()
        for batch in batches:
            images = batch.inputs
            with torch.no_grad():
                expected = teacher(images)
            if reduced:
                images = images.contiguous(memory_format=LAST)
            with torch.autocast("cpu", torch.bfloat16) if reduced else nullcontext():
                logits = student(images)
            loss = kd(logits.float(), expected, batch.targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return train


def kd(logits: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of knowledge distillation."""
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.softmax(expected / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return ALPHA * F.cross_entropy(logits, targets) + (1 - ALPHA) * TEMPERATURE**2 * soft


def experiment(*, fast: bool, reduced: bool) -> dict[str, Any]:
    """Return the same as an experiment."""
    noise = {"size": 8, "image_size": [3, 64, 64], "num_classes": CLASSES}
    images = ["ToImage", {"type": "ToDtype", "params": {"dtype": "float32", "scale": True}}]
    loss = {"temperature": TEMPERATURE, "alpha": ALPHA}
    stage = {
        "name": "kd",
        "epochs": 1,
        "data": {"train": "noise", "batch_size": 8},
        "teacher": {"model": "deep", "fast": fast},
        "student": {"model": "thin"},
        "criterion": {"kd": {"type": "KDLoss", "params": loss}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.001, "momentum": 0.9}},
        "metrics": [],
        "precision": "bf16" if reduced else "fp32",
        "channels_last": reduced,
    }
    classes = {"num_classes": CLASSES}
    return {
        "name": "fast",
        "device": "cpu",
        "datasets": {"noise": {"type": "FakeData", "params": noise, "transforms": images}},
        "models": {
            "deep": {"type": "resnet34", "params": classes},
            "thin": {"type": "resnet18", "params": classes},
        },
        "stages": [stage],
    }


def forwards(teacher: nn.Module, batches: list[Batch], turns: int) -> None:
    """Measure the teacher alone and print."""
    teacher.eval().requires_grad_(False)
    sides: Mapping[str, Forward] = {
        "as it is": teacher,
        "made fast by hand": teacher_by_hand(teacher),
        "distill, `fast: true`": teacher_by_distill(teacher, batches[0].inputs),
    }
    endless = {name: cycle(batches) for name in sides}

    def work(name: str) -> Callable[[], object]:
        return lambda: sides[name](next(endless[name]).inputs)

    with torch.no_grad():
        seconds = taking_turns([work(name) for name in sides], turns, CPU)
    print("| forward of the teacher | time | to as it is |")
    print("| ---------------------- | ---: | ----------: |")
    for name, one in zip(sides, seconds, strict=True):
        print(f"| {name} | {one * 1e3:.1f} ms | {one / seconds[0]:.3f} |")


def steps(teacher: nn.Module, batches: list[Batch], folder: Path, turns: int, each: int) -> None:
    """Measure whole steps and print."""
    teacher.eval().requires_grad_(False)
    models = torchvision.models
    with ExitStack() as stack:
        pairs: dict[str, tuple[Train, Train]] = {}
        for name, fast, reduced in (
            ("plain teacher", False, False),
            ("fast teacher", True, False),
            ("fast teacher, student in bf16", True, True),
        ):
            forward = teacher_by_hand(teacher) if fast else teacher
            hand = by_hand(forward, models.resnet18(num_classes=CLASSES), reduced=reduced)
            own = by_distill(experiment(fast=fast, reduced=reduced), folder, stack)
            pairs[name] = (hand, own)
        trains = [train for pair in pairs.values() for train in pair]
        endless = [cycle(batches) for _ in trains]

        def work(number: int) -> Callable[[], object]:
            return lambda: trains[number](list(islice(endless[number], each)))

        seconds = taking_turns([work(number) for number in range(len(trains))], turns, CPU)
    print("\n| step | by hand | to plain | distill | to plain by hand | to the same by hand |")
    print("| ---- | ------: | -------: | ------: | ---------------: | ------------------: |")
    for number, name in enumerate(pairs):
        hand_s, own_s = seconds[2 * number], seconds[2 * number + 1]
        print(
            f"| {name} | {hand_s / each * 1e3:.1f} ms | {hand_s / seconds[0]:.3f} "
            f"| {own_s / each * 1e3:.1f} ms | {own_s / seconds[0]:.3f} | {own_s / hand_s:.3f} |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11, help="turns of each side")
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    shape = (options.batch_size, 3, options.size, options.size)
    labels = torch.arange(options.batch_size)
    batches = [Batch(torch.randn(*shape), labels % CLASSES, labels) for _ in range(4)]
    teacher = torchvision.models.resnet34(num_classes=CLASSES)
    forwards(teacher, batches, options.turns)
    with tempfile.TemporaryDirectory() as folder:
        steps(teacher, batches, Path(folder), options.turns, each=2)


if __name__ == "__main__":
    main()
