"""What a step of training costs with CRD, beside one with KD: by distill, by hand, by torchdistill.

All sides train a ResNet-8x4 by a ResNet-32x4 on the same batches in memory, without a loader. By
hand is a loop of one's own around the losses and embeddings that `distill` has. torchdistill takes
part where it is installed (pip install torchdistill), and is given the negatives that its loader
would draw. These two train with KD and with CRD as published, `distill` with all kinds of banks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from by_torchdistill import by_torchdistill, contrast_by_torchdistill, is_installed
from contrast import CLASSES, NEGATIVES, OPTIONS, SIZES, WIDTH, Labels
from engine import Train, by_distill
from malloc_pages import add_pages_option, start_again_if_kept
from timing import in_turns, ratio
from torch import Tensor, nn
from torch.nn import functional as F

import distill
from distill.data.batch import Batch
from distill_crd import CRDEmbedding, CRDLoss
from distill_kd import KDLoss

SIZE = SIZES[0]
MODELS = ("cifar_resnet32x4", "cifar_resnet8x4")
LAYER, FEATURES = "avgpool", 256
"""What embeddings are of, and how many numbers it gives, in both models."""
TEMPERATURE, ALPHA, CRD_WEIGHT = 4.0, 0.1, 0.8
LR, MOMENTUM = 0.01, 0.9
KD, PUBLISHED = "KD", "CRD, float32"
ROWS = [KD, *(f"CRD, {bank}" for bank in OPTIONS)]
HAND, OURS, THEIRS = "by hand", "distill", "torchdistill"
Side = tuple[str, str]
"""A row of the table and who trains."""


def kd_by_hand(device: torch.device) -> Train:
    """Return a function that trains with KD as a script of one's own would."""
    teacher, student = _models(device)
    loss = KDLoss(TEMPERATURE, ALPHA)
    optimizer = torch.optim.SGD(student.parameters(), LR, MOMENTUM)

    def train(batches: Iterable[Batch]) -> None:
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            with torch.no_grad():
                expected = teacher(inputs)
            _step(optimizer, loss(student(inputs), expected, targets))

    return train


def crd_by_hand(device: torch.device) -> Train:
    """Return a function that trains with CRD as a script of one's own would, by our loss."""
    teacher, student = _models(device)
    seen: dict[nn.Module, Tensor] = {}
    for model in (teacher, student):
        model.get_submodule(LAYER).register_forward_hook(partial(_kept, seen, model))
    embeddings = [CRDEmbedding(WIDTH), CRDEmbedding(WIDTH)]
    for embedding in embeddings:
        embedding.setup(torch.zeros(2, FEATURES, device=device))
    loss, unit = CRDLoss(NEGATIVES), torch.zeros(2, WIDTH, device=device)
    loss.setup(unit, unit, torch.arange(2), Labels(SIZE))
    learned = [p for module in (student, *embeddings) for p in module.parameters()]
    optimizer = torch.optim.SGD(learned, LR, MOMENTUM)

    def train(batches: Iterable[Batch]) -> None:
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            with torch.no_grad():
                teacher(inputs)
            labelled = F.cross_entropy(student(inputs), targets)
            of_student, of_teacher = (
                embedding(seen[model])
                for embedding, model in zip(embeddings, (student, teacher), strict=True)
            )
            contrast = loss(of_student, of_teacher, batch.index.to(device))
            _step(optimizer, labelled + CRD_WEIGHT * contrast)
            seen.clear()

    return train


def _models(device: torch.device) -> tuple[nn.Module, nn.Module]:
    teacher, student = (distill.plugins().create("models", name).to(device) for name in MODELS)
    return teacher.eval().requires_grad_(False), student.train()


def _kept(
    seen: dict[nn.Module, Tensor], model: nn.Module, module: nn.Module, args: Any, output: Tensor
) -> None:
    seen[model] = output


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def theirs(row: str, batch: int, device: torch.device) -> Train:
    """Return a function that trains as torchdistill does."""
    teacher, student = _models(device)
    if row == KD:
        return by_torchdistill(teacher, student, device, TEMPERATURE, ALPHA)
    drawn = torch.randint(SIZE, (batch, NEGATIVES + 1))
    ends = (LAYER, FEATURES, WIDTH)
    return contrast_by_torchdistill(teacher, student, device, ends, SIZE, drawn, CRD_WEIGHT)


def ours(row: str, device: torch.device, folder: Path, stack: ExitStack) -> Train:
    """Return a function that trains as a stage does."""
    if row == KD:
        kd = {"type": "KDLoss", "params": {"temperature": TEMPERATURE, "alpha": ALPHA}}
        return by_distill(_experiment(device, {"kd": kd}, {}), folder, stack, {"Labels": Labels})
    options = dict(zip(ROWS[1:], OPTIONS.values(), strict=True))[row]
    embeddings = {
        f"{side}_embedding": {"type": "CRDEmbedding", "inputs": {"features": f"{side}.{LAYER}"}}
        for side in ("student", "teacher")
    }
    crd = {
        "type": "CRDLoss",
        "params": written(options),
        "inputs": {**{name: name for name in embeddings}, "index": "index"},
        "weight": CRD_WEIGHT,
    }
    terms = {"ce": {"type": "CrossEntropyLoss"}, "crd": crd}
    described = _experiment(device, terms, embeddings)
    return by_distill(described, folder, stack, {"Labels": Labels})


def written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they stand in a file."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in options.items()
    }


def _experiment(
    device: torch.device, criterion: Mapping[str, Any], auxiliary: Mapping[str, Any]
) -> dict[str, Any]:
    deep, thin = MODELS
    return {
        "name": "contrast",
        "device": str(device),
        "log_every": 1_000_000,
        "datasets": {"noise": {"type": "Labels", "params": {"size": SIZE}}},
        "models": {"deep": {"type": deep}, "thin": {"type": thin}},
        "stages": [
            {
                "name": "crd",
                "epochs": 1,
                "data": {"train": "noise", "batch_size": 64},
                "teacher": {"model": "deep"},
                "student": {"model": "thin"},
                "auxiliary": auxiliary,
                "criterion": criterion,
                "optimizer": {"type": "SGD", "params": {"lr": LR, "momentum": MOMENTUM}},
                "metrics": [],
            }
        ],
        "observers": [],
    }


def compare(batch: int, turns: int, device: torch.device) -> dict[Side, list[float]]:
    """Return the seconds of a step of each side of each row, turn by turn."""
    images = torch.randn(batch, 3, 32, 32)
    targets = torch.randint(CLASSES, (batch,))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides: dict[Side, Train] = {(row, OURS): ours(row, device, folder, stack) for row in ROWS}
        sides[KD, HAND], sides[PUBLISHED, HAND] = kd_by_hand(device), crd_by_hand(device)
        if is_installed():
            sides |= {(row, THEIRS): theirs(row, batch, device) for row in (KD, PUBLISHED)}

        def step(train: Train) -> None:
            train([Batch(images, targets, torch.randint(SIZE, (batch,)))])

        tasks = [partial(step, train) for train in sides.values()]
        return dict(zip(sides, in_turns(tasks, turns, device), strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="turns of each side")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    add_pages_option(parser)
    options = parser.parse_args()
    start_again_if_kept(options.pages)
    batch = options.batch_size
    found = compare(batch, options.turns, torch.device(options.device))
    print(f"A step of ResNet-32x4 to ResNet-8x4, batch of {batch}\n")
    parts = ("distill : hand", "of distill's KD", "of torchdistill's KD")
    print(f"| criterion | {HAND} | {OURS} | {THEIRS} | {' | '.join(parts)} |")
    print("| --------- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in ROWS:
        times = [_time(found.get((row, side))) for side in (HAND, OURS, THEIRS)]
        to_hand = _ratio(found, (row, OURS), (row, HAND))
        to_kd = [_ratio(found, (row, side), (KD, side)) for side in (OURS, THEIRS)]
        print(f"| {row} | {' | '.join([*times, to_hand, *to_kd])} |")


def _ratio(found: Mapping[Side, Sequence[float]], one: Side, other: Side) -> str:
    return f"{ratio(found[one], found[other]):.3f}" if {one, other} <= set(found) else ""


def _time(seconds: Sequence[float] | None) -> str:
    return "" if seconds is None else f"{median(seconds) * 1e3:.1f} ms"


if __name__ == "__main__":
    main()
