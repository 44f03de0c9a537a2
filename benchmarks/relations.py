"""What losses on relations between samples cost: beside torchdistill's, and of a step.

Three measurements, each with its sides in turns, so that whatever slows the machine slows all.
Printed are medians of forward and backward, and ratios.

``torchdistill``: RKD, CCKD and both stages of SSKD on the same tensors as torchdistill's, at
published shapes; where both compute the same, also by how much their gradients differ. It is left
out where torchdistill is not installed (pip install torchdistill).

``steps``: each loss at its published setting, against a step of training a ResNet-18. The step is
measured with fewer images, and taken for as much longer as the loss sees more.

``sskd``: a step of SSKD, which has four images where others have one, against one of KD.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from contrast import CLASSES, Labels
from engine import by_distill
from losses import print_head, report, training_step
from malloc_pages import add_pages_option, start_again_if_kept
from relation_methods import groups
from relation_pairs import gradient_difference, gradients, pairs
from timing import taking_turns

from distill import Sample, Views
from distill.data.batch import Batch

SSKD_BOUND = 4.3
"""How many steps of KD one of SSKD may take."""
SSKD_BATCH, SSKD_VIEWS, SIZE = 16, 4, 32


def compare_with_torchdistill(options: argparse.Namespace) -> None:
    """Print what losses cost beside torchdistill's, and by how much gradients differ."""
    try:
        import torchdistill.losses.mid_level  # noqa: F401
    except ImportError:
        print("torchdistill is not installed, and not compared with")
        return
    device = torch.device(options.device)
    print("| loss | distill | torchdistill | of torchdistill's |")
    print("| ---- | ------: | -----------: | ----------------: |")
    apart: list[tuple[float, float]] = []
    for pair in pairs(device):
        tasks = [partial(gradients, loss, pair.leaves) for loss in (pair.ours, pair.theirs)]
        ours, theirs = taking_turns(tasks, options.turns, device)
        if pair.alike:
            apart.append(gradient_difference(pair))
        print(
            f"| {pair.title} | {ours * 1e3:,.2f} ms | {theirs * 1e3:,.2f} ms "
            f"| 1/{theirs / ours:.1f} |",
            flush=True,
        )
    most = max(difference for difference, _ in apart)
    relative = max(difference / largest for difference, largest in apart)
    print(
        f"\nWhere both compute the same, elements of gradients differ by at most {most:.1e}, "
        f"{relative:.1e} of the largest."
    )


def compare_with_step(options: argparse.Namespace) -> None:
    """Print what losses cost, beside a step with as many images."""
    device = torch.device(options.device)
    images = torch.randn(options.batch, 3, options.size, options.size)
    step = training_step(torchvision.models.resnet18(), images.to(device))
    print_head()
    taken = {}
    for group in groups(images):
        steps = group.images / options.batch
        found = report(step, group.methods, group.values, options.turns, device, steps)
        taken[group.images] = f"of {group.images}: {found * 1e3:,.0f} ms"
    size = f"{options.size} x {options.size}"
    print(f"\nSteps, by the number of images of {size}, {'; '.join(taken.values())}.")
    print(f"They are measured with {options.batch} images and taken as many times.")


class Noise(Labels):
    """Images of noise with labels."""

    def __getitem__(self, index: int) -> Any:
        return Sample(torch.randn(3, SIZE, SIZE), int(self.targets[index]))


class NoiseViews(Labels):
    """Samples of noise that have four views each."""

    def __getitem__(self, index: int) -> Any:
        return Sample(Views(torch.randn(SSKD_VIEWS, 3, SIZE, SIZE)), int(self.targets[index]))


def compare_sskd_with_kd(options: argparse.Namespace) -> None:
    """Print what a step costs with KD, and with SSKD in its place."""
    device = torch.device(options.device)
    kd = {"type": "KDLoss", "params": {"temperature": 4.0, "alpha": 0.1}}
    heads: dict[str, Any] = {
        f"{side}_head": {"type": "SSKDHead", "inputs": {"features": f"{side}.avgpool"}}
        for side in ("student", "teacher")
    }
    heads["teacher_head"]["frozen"] = True
    sskd = {
        "type": "SSKDLoss",
        "params": {"loss_weights": [0.1, 0.9, 10.0, 2.7]},
        "inputs": {"student_embeddings": "student_head", "teacher_embeddings": "teacher_head"},
    }
    described = [
        _experiment(device, "Noise", kd, {}),
        _experiment(device, "NoiseViews", sskd, heads),
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = {"Noise": Noise, "NoiseViews": NoiseViews}
        trains = [by_distill(experiment, folder, stack, data) for experiment in described]
        tasks = [
            partial(train, [_batch(views)])
            for train, views in zip(trains, (1, SSKD_VIEWS), strict=True)
        ]
        plain, rotated = taking_turns(tasks, options.turns, device)
    ratio = rotated / plain
    print(f"A step of ResNet-20 to ResNet-8, batch of {SSKD_BATCH}\n")
    print("| criterion | step | of KD's |")
    print("| --------- | ---: | ------: |")
    print(f"| KD | {plain * 1e3:.1f} ms | 1 |")
    print(f"| SSKD | {rotated * 1e3:.1f} ms | {ratio:.3f}{' (!)' if ratio > SSKD_BOUND else ''} |")


def _batch(views: int) -> Batch:
    """Return a batch with so many views of each sample."""
    inputs = torch.randn(views * SSKD_BATCH, 3, SIZE, SIZE)
    return Batch(inputs, torch.randint(CLASSES, (SSKD_BATCH,)), torch.arange(SSKD_BATCH))


def _experiment(
    device: torch.device, data: str, loss: Mapping[str, Any], auxiliary: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": "relations",
        "device": str(device),
        "datasets": {"noise": {"type": data, "params": {"size": SSKD_BATCH}}},
        "models": {"deep": {"type": "cifar_resnet20"}, "thin": {"type": "cifar_resnet8"}},
        "stages": [
            {
                "name": "distilled",
                "epochs": 1,
                "data": {"train": "noise", "batch_size": SSKD_BATCH},
                "teacher": {"model": "deep"},
                "student": {"model": "thin"},
                "auxiliary": auxiliary,
                "criterion": {"loss": loss},
                "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
                "metrics": [],
            }
        ],
    }


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "torchdistill": compare_with_torchdistill,
    "steps": compare_with_step,
    "sskd": compare_sskd_with_kd,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="images in a step of ResNet-18")
    parser.add_argument("--size", type=int, default=224, help="their height and width")
    add_pages_option(parser)
    parser.add_argument("--only", choices=list(PARTS))
    options = parser.parse_args()
    start_again_if_kept(options.pages)
    torch.manual_seed(0)
    for name, measure in PARTS.items():
        if options.only in (None, name):
            measure(options)
            print()


if __name__ == "__main__":
    main()
