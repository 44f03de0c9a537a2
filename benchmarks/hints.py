"""What hint training costs: FitNet's first stage with whole models, cut by hand, and by default.

A ResNet-18 student learns to give what a deeper ResNet's first stage gives, through a 1x1
convolution. All sides train on the same batches in memory, a few steps in turn, so that whatever
slows the machine slows all: distill with whole models, with the models written out as rows of
modules (``redesign: sequential``), and with its default, which finds by itself where to stop; a
hand-written loop over truncated models; and torchdistill, where it is installed, with its own way
to cut models. Printed are medians of the time of a step, and ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
import torchvision
from by_torchdistill import hints_by_torchdistill, is_installed
from engine import Train, by_distill, endlessly
from timing import in_turns, ratio
from torch import nn

from distill.data.batch import Batch

TEACHERS = ("resnet34", "resnet50", "resnet101", "resnet152")
CPU = torch.device("cpu")
LAYER, WIDTH = "layer1", 64
STEPS = 2
"""Of a side, each time."""
FRONT = ("conv1", "bn1", "relu", "maxpool", LAYER)
REDESIGNS = ("whole", {"type": "sequential", "params": {"modules": list(FRONT)}}, "needed")


def by_hand(teacher: nn.Module, student: nn.Module, regressor: nn.Module) -> Train:
    """Return a function that trains truncated models as a script of one's own would."""
    fronts = [nn.Sequential(*map(m.get_submodule, FRONT)) for m in (teacher, student)]
    parameters = [*fronts[1].parameters(), *regressor.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def train(batches: Iterable[Batch]) -> None:
        fronts[1].train()
        regressor.train()
        for batch in batches:
            with torch.no_grad():
                goal = fronts[0](batch.inputs)
            loss = nn.functional.mse_loss(regressor(fronts[1](batch.inputs)), goal)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return train


def _experiment(teacher: str, redesign: object) -> dict[str, object]:
    noise = {"type": "FakeData", "params": {"size": 8, "image_size": [3, 64, 64]}}
    images = ["ToImage", {"type": "ToDtype", "params": {"dtype": "float32", "scale": True}}]
    regressor = {"in_channels": WIDTH, "out_channels": _channels(teacher), "kernel_size": 1}
    inputs = {"input": "regressor", "target": f"teacher.{LAYER}"}
    return {
        "name": "hints",
        "datasets": {"noise": {**noise, "transforms": images}},
        "models": {"deep": {"type": teacher}, "thin": {"type": "resnet18"}},
        "stages": [
            {
                "name": "hint",
                "epochs": 1,
                "data": {"train": "noise", "batch_size": 8},
                "teacher": {"model": "deep", "redesign": redesign},
                "student": {"model": "thin", "redesign": redesign},
                "auxiliary": {
                    "regressor": {
                        "type": "Conv2d",
                        "params": regressor,
                        "inputs": {"input": f"student.{LAYER}"},
                    }
                },
                "criterion": {"hint": {"type": "MSELoss", "inputs": inputs}},
                "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
                "metrics": [],
            }
        ],
    }


def _channels(teacher: str) -> int:
    return 64 if teacher == "resnet34" else 256


def _by_torchdistill(teacher: str) -> Train:
    deep = torchvision.models.get_model(teacher)  # type: ignore[attr-defined]
    thin = torchvision.models.resnet18()
    return hints_by_torchdistill(deep, thin, FRONT, (WIDTH, _channels(teacher)), CPU)


def compare(teacher: str, batches: list[Batch], folder: Path, turns: int) -> list[list[float]]:
    """Return the seconds of each turn: by hand, by distill for each redesign, torchdistill."""
    with ExitStack() as stack:
        torch.manual_seed(0)
        deep = torchvision.models.get_model(teacher)  # type: ignore[attr-defined]
        deep.eval().requires_grad_(False)
        regressor = nn.Conv2d(WIDTH, _channels(teacher), 1)
        sides = [by_hand(deep, torchvision.models.resnet18(), regressor)]
        described = [_experiment(teacher, redesign) for redesign in REDESIGNS]
        sides += [by_distill(experiment, folder, stack) for experiment in described]
        if is_installed():
            sides.append(_by_torchdistill(teacher))
        return in_turns([endlessly(side, batches, STEPS) for side in sides], turns, CPU)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11, help="turns of each side")
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS))
    options = parser.parse_args()
    shape = (options.batch_size, 3, options.size, options.size)
    batches = [Batch(torch.randn(*shape), None, torch.arange(options.batch_size)) for _ in range(4)]
    print(
        "| teacher | by hand, cut | whole | sequential | needed | torchdistill, cut |"
        " needed to hand | needed to whole | needed to torchdistill |"
    )
    print(
        "| ------- | -----------: | ----: | ---------: | -----: | ----------------: |"
        " -------------: | --------------: | ---------------------: |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for teacher in options.teachers:
            times = compare(teacher, batches, Path(folder), options.turns)
            hand, whole, _, needed, *theirs = times
            cells = [f"{median(one) / STEPS * 1e3:.1f} ms" for one in times]
            ratios = [f"{ratio(needed, other):.3f}" for other in (hand, whole, *theirs)]
            empty = [""] * (not theirs)
            row = [teacher.replace("resnet", "ResNet-"), *cells, *empty, *ratios, *empty]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
