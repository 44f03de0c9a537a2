"""What a fast teacher saves: knowledge distillation from ResNet-34 into ResNet-18 on the CPU.

First the teacher's forward alone: as it is, made fast by hand (BatchNorm folded, channels last,
bf16), and with `fast: true`. Then whole steps, by a hand-written loop and by distill: with the
plain teacher, with the fast one, with a student in bf16 besides, and with such a student and the
teacher's outputs stored, which the loop has in a tensor and distill in a store that it reads and
checks in each step. All take turns on the same batches in memory, so that whatever slows the
machine slows all. Printed are medians, ratios to the hand-written loop with the plain teacher, and
ratios of distill to the loop that does the same.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from engine import Train, by_distill, by_distill_stored, endlessly, read_ahead
from timing import in_turns, ratio
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.utils.data import Dataset

from distill.data.batch import Batch
from distill.model.fast import FastTeacher, cast, fold, foldable

TEMPERATURE, ALPHA, CLASSES = 4.0, 0.5, 100
BATCHES = 4
CPU = torch.device("cpu")
LAST = torch.channels_last
Forward = Callable[[Tensor], Tensor]
Expected = Callable[[Batch], Tensor]
"""What a teacher gives for a batch."""


class Noise(Dataset[tuple[Tensor, int]]):
    """Images of noise with labels, in memory."""

    def __init__(self, samples: int, size: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(samples, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % CLASSES


DATA = {"Noise": Noise}


@dataclass(frozen=True)
class Way:
    """How a step is made cheaper.

    Attributes:
        fast: the teacher is made fast.
        stored: its outputs are stored, and all are there.
        reduced: the student is in bf16 with channels last.
    """

    fast: bool = False
    stored: bool = False
    reduced: bool = False


WAYS = {
    "plain teacher": Way(),
    "fast teacher": Way(fast=True),
    "fast teacher, student in bf16": Way(fast=True, reduced=True),
    "stored outputs, student in bf16": Way(stored=True, reduced=True),
}


def teacher_by_hand(teacher: nn.Module) -> Forward:
    """Return the forward of a teacher that is made fast as in a script of one's own."""
    fast = fuse(teacher.eval()).to(memory_format=LAST).bfloat16().requires_grad_(False)

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = fast(images.to(torch.bfloat16, memory_format=LAST))
        return logits.float()

    return forward


def teacher_by_distill(teacher: nn.Module, images: Tensor) -> Forward:
    """Return the forward of a teacher as ``fast: true`` makes it."""
    fast = copy.deepcopy(teacher).eval().requires_grad_(False)
    pairs, _ = foldable(fast, lambda: fast(images[:2]), [])
    fold(fast, pairs)
    cast(fast, torch.bfloat16)
    fast.to(memory_format=LAST)
    form = FastTeacher(fast, None, CPU, CPU, torch.bfloat16, channels_last=True)

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = form.back(form(Batch(images, None, torch.arange(len(images)))))
        return logits

    return forward


def stored_by_hand(teacher: nn.Module, batches: list[Batch]) -> Expected:
    """Return what looks up what the teacher has given for these batches."""
    table = torch.zeros(sum(map(len, batches)), CLASSES)
    with torch.no_grad():
        for batch in batches:
            table[batch.index] = teacher(batch.inputs)
    return lambda batch: table[batch.index]


def by_hand(expects: Expected, student: nn.Module, *, reduced: bool) -> Train:
    """Return a function that trains a student as a script of one's own would."""
    if reduced:
        student.to(memory_format=LAST)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def train(batches: Iterable[Batch]) -> None:
        student.train()
        for batch in batches:
            images = batch.inputs
            with torch.no_grad():
                expected = expects(batch)
            if reduced:
                images = images.contiguous(memory_format=LAST)
            with torch.autocast("cpu", torch.bfloat16) if reduced else nullcontext():
                logits = student(images)
            loss = kd(logits.float(), expected, batch.targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return train


def kd(logits: Tensor, expected: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of knowledge distillation."""
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.softmax(expected / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return ALPHA * F.cross_entropy(logits, targets) + (1 - ALPHA) * TEMPERATURE**2 * soft


def experiment(way: Way, shape: Sequence[int]) -> dict[str, Any]:
    """Return the same as an experiment, on batches of this shape."""
    batch_size, _, _, size = shape
    noise = {"samples": BATCHES * batch_size, "size": size}
    loss = {"temperature": TEMPERATURE, "alpha": ALPHA}
    stage = {
        "name": "kd",
        "epochs": 1,
        "data": {"train": "noise", "batch_size": batch_size},
        "teacher": {"model": "deep", "fast": way.fast, "store": way.stored},
        "student": {"model": "thin"},
        "criterion": {"kd": {"type": "KDLoss", "params": loss}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.001, "momentum": 0.9}},
        "metrics": [],
        "precision": "bf16" if way.reduced else "fp32",
        "channels_last": way.reduced,
    }
    classes = {"num_classes": CLASSES}
    return {
        "name": "fast",
        "device": "cpu",
        "datasets": {"noise": {"type": "Noise", "params": noise}},
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
        times = in_turns([work(name) for name in sides], turns, CPU)
    print("| forward of the teacher | time | to as it is |")
    print("| ---------------------- | ---: | ----------: |")
    for name, one in zip(sides, times, strict=True):
        print(f"| {name} | {median(one) * 1e3:.1f} ms | {ratio(one, times[0]):.3f} |")


def steps(teacher: nn.Module, batches: list[Batch], folder: Path, turns: int, each: int) -> None:
    """Measure whole steps and print."""
    teacher.eval().requires_grad_(False)
    with ExitStack() as stack:
        pairs = [pair(way, teacher, batches, folder, stack) for way in WAYS.values()]
        trains = [train for both in pairs for train in both]
        times = in_turns([endlessly(train, batches, each) for train in trains], turns, CPU)
    print("\n| step | by hand | to plain | distill | to plain by hand | to the same by hand |")
    print("| ---- | ------: | -------: | ------: | ---------------: | ------------------: |")
    for number, name in enumerate(WAYS):
        hand, own = times[2 * number], times[2 * number + 1]
        print(
            f"| {name} | {median(hand) / each * 1e3:.1f} ms | {ratio(hand, times[0]):.3f} "
            f"| {median(own) / each * 1e3:.1f} ms | {ratio(own, times[0]):.3f} "
            f"| {ratio(own, hand):.3f} |"
        )


def pair(
    way: Way, teacher: nn.Module, batches: list[Batch], folder: Path, stack: ExitStack
) -> tuple[Train, Train]:
    """Return functions that train one way, by hand and by distill."""
    forward = teacher_by_hand(teacher) if way.fast else teacher
    expects: Expected = lambda batch: forward(batch.inputs)  # noqa: E731
    if way.stored:
        expects = stored_by_hand(teacher, batches)
    student = torchvision.models.resnet18(num_classes=CLASSES)
    hand = by_hand(expects, student, reduced=way.reduced)
    described = experiment(way, batches[0].inputs.shape)
    if way.stored:
        return hand, by_distill_stored(described, folder, stack, batches, DATA)
    return hand, by_distill(described, folder, stack, DATA)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=21, help="turns of each side")
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    shape = (options.batch_size, 3, options.size, options.size)
    teacher = torchvision.models.resnet34(num_classes=CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        batches = read_ahead(experiment(Way(), shape), Path(folder), DATA)
        forwards(teacher, batches, options.turns)
        steps(teacher, batches, Path(folder), options.turns, each=2)


if __name__ == "__main__":
    main()
