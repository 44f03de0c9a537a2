"""What CRD costs: its loss beside torchdistill's, and a step of training beside one of KD.

Both losses get the same embeddings, banks and negatives; sides take turns, so that whatever slows
the machine slows all. Printed are medians of forward and backward, and ratios. The floor is what it
takes to move as many bytes as the rows of all negatives have, at the measured speed of a copy.

torchdistill is compared with where it is installed (pip install torchdistill).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from engine import by_distill
from malloc_pages import add_pages_option, start_again_if_kept
from timing import Work, taking_turns
from torch import Tensor
from torch.nn import functional as F

from distill.data.batch import Batch
from distill_crd import CRDLoss

NEGATIVES, WIDTH, CLASSES = 16384, 128, 100
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "float32 banks": {},
    "bfloat16 banks": {"bank_dtype": torch.bfloat16},
    "shared negatives": {"shared_negatives": True},
    "queue of 16,384": {"queue": NEGATIVES},
}
SIZES = (50_000, 200_000, 400_000, 1_281_167)


class Labels:
    """Black images with labels."""

    def __init__(self, size: int):
        self.targets = torch.arange(size) % CLASSES

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 32, 32), int(self.targets[index])


DATA = {"Labels": Labels}


def written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as they stand in a file."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in options.items()
    }


def unit_vectors(batch: int, device: torch.device) -> Tensor:
    """Return random embeddings."""
    vectors = F.normalize(torch.randn(batch, WIDTH, device=device), dim=1)
    return vectors.requires_grad_()


def ours(size: int, batch: int, device: torch.device, **options: Any) -> Work:
    """Return a function that runs distill's loss there and back on other samples each time."""
    loss, student, teacher = CRDLoss(NEGATIVES, **options), *_sides(batch, device)
    loss.setup(student, teacher, torch.arange(batch), Labels(size))

    def run() -> None:
        there_and_back(loss, student, teacher, torch.randint(size, (batch,)).to(device))

    return run


def there_and_back(loss: CRDLoss, student: Tensor, teacher: Tensor, index: Tensor) -> None:
    """Run a loss forward and backward."""
    loss(student, teacher, index).backward()


def reference(size: int, batch: int, device: torch.device) -> Work:
    """Return the same of torchdistill's, given negatives as its loader gives them."""
    from torchdistill.losses.mid_level import CRDLoss as Reference

    loss = Reference("norm", "empty", "norm", WIDTH, size, NEGATIVES, size).to(device)
    student, teacher = _sides(batch, device)
    drawn = torch.randint(size, (batch, NEGATIVES + 1), device=device)

    def run() -> None:
        index = torch.randint(size, (batch,)).to(device)
        extras = {"pos_idx": index, "contrast_idx": drawn}
        outputs = {"norm": {"output": student}, "empty": {"input": extras}}
        loss(outputs, {"norm": {"output": teacher}}).backward()

    return run


def _sides(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return unit_vectors(batch, device), unit_vectors(batch, device)


def floor(batch: int, device: torch.device, width: int = 4) -> float:
    """Return the seconds that it takes to read the rows of all negatives, at a copy's speed."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    (seconds,) = taking_turns([lambda: target.copy_(source)], 5, device)
    speed = 2 * source.numel() * source.element_size() / seconds
    return 2 * batch * (NEGATIVES + 1) * WIDTH * width / speed


def compare_losses(batch: int, turns: int, device: torch.device) -> None:
    """Print what the loss costs with each option, beside torchdistill's and the floor."""
    size = SIZES[0]
    names, tasks = list(OPTIONS), [ours(size, batch, device, **o) for o in OPTIONS.values()]
    try:
        tasks.append(reference(size, batch, device))
        names.append("torchdistill")
    except ImportError:
        print("torchdistill is not installed, and not compared with")
    seconds = dict(zip(names, taking_turns(tasks, turns, device), strict=True))
    least = floor(batch, device)
    print(f"\n{size:,} samples, batch of {batch}; floor {least * 1e3:.1f} ms\n")
    print("| loss | time | of torchdistill's | to the floor |")
    print("| ---- | ---: | ----------------: | -----------: |")
    for name, time in seconds.items():
        whole = seconds.get("torchdistill")
        part = f"1/{whole / time:.1f}" if whole else ""
        print(f"| {name} | {time * 1e3:.1f} ms | {part} | {time / least:.2f} |")


def compare_sizes(batch: int, turns: int, device: torch.device) -> None:
    """Print what the loss and its set-up cost for more samples."""
    print("\n| samples | set-up | beyond the banks | loss | of it drawing |")
    print("| ------: | -----: | ---------------: | ---: | ------------: |")
    student, teacher = _sides(batch, device)
    for size in SIZES:
        labels, loss = Labels(size), CRDLoss(NEGATIVES)
        before = psutil.Process().memory_info().rss
        started = perf_counter()
        loss.setup(student, teacher, torch.arange(batch), labels)
        taken = perf_counter() - started
        banks = 2 * size * WIDTH * 4 if device.type == "cpu" else 0
        beyond = psutil.Process().memory_info().rss - before - banks
        index = torch.randint(size, (batch,)).to(device)
        drawn = partial(loss._negatives, index, torch.tensor(1, device=device))
        tasks: list[Work] = [partial(there_and_back, loss, student, teacher, index), drawn]
        whole, drawing = taking_turns(tasks, turns, device)
        print(
            f"| {size:,} | {taken:.2f} s | {beyond / 1e6:,.0f} MB | {whole * 1e3:.1f} ms "
            f"| {drawing * 1e3:.1f} ms |",
            flush=True,
        )


def compare_steps(batch: int, turns: int, device: torch.device) -> None:
    """Print what a step costs with KD, and with CRD in its place."""
    images = torch.randn(batch, 3, 32, 32)
    targets = torch.randint(CLASSES, (batch,))
    embeddings = {
        f"{side}_embedding": {"type": "CRDEmbedding", "inputs": {"features": f"{side}.avgpool"}}
        for side in ("student", "teacher")
    }
    wires = {**{name: name for name in embeddings}, "index": "index"}
    kd = {"type": "KDLoss", "params": {"temperature": 4.0, "alpha": 0.1}}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trains = [by_distill(_experiment(device, {"kd": kd}, {}), folder, stack, DATA)]
        for options in OPTIONS.values():
            crd = {"type": "CRDLoss", "params": written(options), "inputs": wires, "weight": 0.8}
            terms = {"ce": {"type": "CrossEntropyLoss"}, "crd": crd}
            trains.append(by_distill(_experiment(device, terms, embeddings), folder, stack, DATA))

        def step(train: Callable[[list[Batch]], None]) -> None:
            train([Batch(images, targets, torch.randint(SIZES[0], (batch,)))])

        tasks = [partial(step, train) for train in trains]
        plain, *others = taking_turns(tasks, turns, device)
    print(f"\nA step of ResNet-32x4 to ResNet-8x4, batch of {batch}\n")
    print("| criterion | step | of KD's |")
    print("| --------- | ---: | ------: |")
    print(f"| KD | {plain * 1e3:.1f} ms | 1 |")
    for name, time in zip(OPTIONS, others, strict=True):
        print(f"| CRD, {name} | {time * 1e3:.1f} ms | {time / plain:.3f} |")


def _experiment(
    device: torch.device, criterion: Mapping[str, Any], auxiliary: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": "contrast",
        "device": str(device),
        "datasets": {"noise": {"type": "Labels", "params": {"size": SIZES[0]}}},
        "models": {"deep": {"type": "cifar_resnet32x4"}, "thin": {"type": "cifar_resnet8x4"}},
        "stages": [
            {
                "name": "crd",
                "epochs": 1,
                "data": {"train": "noise", "batch_size": 64},
                "teacher": {"model": "deep"},
                "student": {"model": "thin"},
                "auxiliary": auxiliary,
                "criterion": criterion,
                "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
                "metrics": [],
            }
        ],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    add_pages_option(parser)
    parser.add_argument("--only", choices=["losses", "sizes", "steps"])
    options = parser.parse_args()
    start_again_if_kept(options.pages)
    parts = {"losses": compare_losses, "steps": compare_steps, "sizes": compare_sizes}
    for name, measure in parts.items():
        if options.only in (None, name):
            measure(options.batch_size, options.turns, torch.device(options.device))


if __name__ == "__main__":
    main()
