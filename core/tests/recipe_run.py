"""Runs an experiment with everything that a recipe may ask for; in one process or in several.

Arguments: the folder of the run, then ``KEY=VALUE`` overrides; ``stop=STAGE:EPOCH`` ends the
process by force when that epoch is over, before it is saved.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import distill
from distill.testing import ToyData, toy_registry

EXPERIMENT: dict[str, Any] = {
    "name": "recipe",
    "device": "cpu",
    "seed": 3,
    "log_every": 2,
    "datasets": {
        "train": {"type": "Faulty", "params": {"size": 27, "shape": [1, 6, 6], "bad": [4, 5, 26]}},
        "val": {"type": "ToyData", "params": {"size": 13, "shape": [1, 6, 6], "seed": 1}},
        "more": {"type": "ToyData", "params": {"size": 8, "shape": [1, 6, 6], "seed": 2}},
    },
    "models": {
        "wide": {"type": "ToyConvNet", "params": {"width": 6}},
        "thin": {"type": "ToyConvNet", "params": {"width": 4}},
        "mate": {"type": "ToyConvNet", "params": {"width": 6}, "seed": 1},
    },
    "stages": [
        {
            "name": "teach",
            "epochs": 3,
            "data": {
                "train": "train",
                "validate": ["val", "more"],
                "batch_size": 5,
                "accumulate": 2,
                "on_bad_sample": "skip",
                "batch_transforms": ["RollMix", "SmoothLabelsOfThree"],
            },
            "student": {"model": "wide"},
            "auxiliary": {"peer": {"model": "mate", "inputs": {"inputs": "inputs"}}},
            "criterion": {
                "ce": {"type": "CrossEntropyLoss"},
                "peer_ce": {"type": "CrossEntropyLoss", "inputs": {"student": "peer"}},
                "alike": {
                    "type": "MSELoss",
                    "inputs": {"input": "student.conv", "target": "peer.conv"},
                },
            },
            "optimizer": {
                # Not Adam, which blows the rounding of a bias before BatchNorm up to full steps.
                "type": "SGD",
                "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
                "no_decay": ["bias", "norm"],
                "groups": [{"match": ["student.head"], "params": {"lr": 0.2}}],
            },
            "scheduler": [
                {
                    "type": "LinearLR",
                    "params": {"start_factor": 0.1, "total_iters": 2},
                    "unit": "steps",
                    "until": 2,
                },
                {"type": "CosineAnnealingLR", "params": {"T_max": 3}},
            ],
            "clip": {"norm": 0.5},
            "ema": {"decay": 0.8, "warmup": True},
            "evaluate": {"every": 2, "unit": "steps"},
            "metrics": ["accuracy", "cross_entropy"],
            "best_by": "ema.cross_entropy",
            "keep": "best",
        },
        {
            "name": "kd",
            "epochs": 2,
            "data": {"sampler": {"type": "RepeatedAugmentationSampler"}},
            "teacher": {"model": "wide"},
            "student": {"model": "thin"},
            "auxiliary": {
                "regressor": {
                    "type": "Conv2d",
                    "params": {"in_channels": 4, "out_channels": 6, "kernel_size": 1},
                    "inputs": {"input": "student.conv"},
                }
            },
            "criterion": {
                "ce": {"type": "CrossEntropyLoss"},
                "hint": {
                    "type": "MSELoss",
                    "inputs": {"input": "regressor", "target": "teacher.conv"},
                    "weight": {"over": 6, "unit": "steps"},
                },
            },
            "evaluate": {"every": 1},
            "keep": "ema",
        },
    ],
    "test": {"dataset": "more", "metrics": ["accuracy"]},
    "observers": [{"type": "ResultFiles"}, {"type": "Stop"}],
}


class Faulty(ToyData):
    """Toy data some samples of which cannot be read or are no numbers; the others are shifted."""

    def __init__(
        self,
        bad: Sequence[int] = (),
        nan: Sequence[int] = (),
        size: int = 16,
        shape: tuple[int, ...] = (4,),
    ):
        super().__init__(size, 3, shape)
        self.bad = set(bad)
        self.inputs[list(nan)] = torch.nan

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise OSError(f"image {index} is truncated")
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(()), label


class RollMix:
    """Mixes each sample with the one before it, by a share that is drawn."""

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        share = torch.rand(()).item()
        soft = torch.nn.functional.one_hot(targets, 3).float()
        return self.mixed(inputs, share), self.mixed(soft, share)

    @staticmethod
    def mixed(values: torch.Tensor, share: float) -> torch.Tensor:
        return values * (1 - share) + values.roll(1, 0) * share


class SmoothLabelsOfThree:
    """Label smoothing, as a second transform in the row."""

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return inputs, 0.9 * targets + 0.1 / 3


class Stop(distill.Observer):
    """Kills the process where the last argument says."""

    def epoch_end(self, event: distill.EpochEnd) -> None:
        stop = next((a.removeprefix("stop=") for a in sys.argv if a.startswith("stop=")), None)
        if stop == f"{event.stage}:{event.position.epoch}":
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, *arguments: str) -> None:
    file = Path(folder) / f"experiment-{os.environ.get('RANK', '0')}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False), "utf-8")
    overrides = [argument for argument in arguments if not argument.startswith("stop=")]
    registry = toy_registry(
        datasets={"Faulty": Faulty},
        batch_transforms={"RollMix": RollMix, "SmoothLabelsOfThree": SmoothLabelsOfThree},
        observers={"Stop": Stop},
    )
    distill.run(distill.load(file, overrides), registry=registry, runs=folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
