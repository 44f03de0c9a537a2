"""What start-up costs: checking a file, and the time until a run's first step.

Each in a fresh process, in turns with one that imports torch and ends, whose time is taken off.
Printed are medians. Files are read from memory and byte code is compiled before: the first turn,
which is not counted, sees to both. That code goes to a folder of its own, so that it does not
matter whether this machine keeps any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from timing import Work, taking_turns

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "plugins/distill-kd/examples/digits-kd.yaml"
PRESETS = ROOT / "plugins/datasets-vision/src/distill_datasets_vision/presets"
CHECKED = {
    "digits, KD": DIGITS,
    "CIFAR-10, KD": ROOT / "plugins/distill-kd/src/distill_kd/presets/cifar10-kd.yaml",
    "ImageNet, a ResNet-18 alone": PRESETS / "imagenet-student.yaml",
}
CHECK_BOUND, STEP_BOUND = 0.5, 2.0
"""Seconds: of a check beyond importing torch, of a run's first step beyond a check."""
UP_TO_FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from distill.cli import main
register_optimizer_step_post_hook(lambda *_: os._exit(0))
main(["run", sys.argv[1], "--runs", sys.argv[2]])
"""


def python(environment: dict[str, str], *arguments: str) -> None:
    """Run a Python process to its end.

    Raises:
        CalledProcessError: if it fails; what it wrote is shown.
    """
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()


def first_step(environment: dict[str, str]) -> None:
    """Start a run and end it behind its first step."""
    with tempfile.TemporaryDirectory() as runs:
        python(environment, "-c", UP_TO_FIRST_STEP, str(DIGITS), runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        run = partial(python, environment)
        tasks: list[Work] = [partial(run, "-c", "import torch")]
        tasks += [partial(run, "-m", "distill", "check", str(file)) for file in CHECKED.values()]
        tasks += [partial(first_step, environment)]
        imported, *checks, step = taking_turns(tasks, options.turns, torch.device("cpu"))
    print("| | beyond importing torch | at most |\n| --- | ---: | ---: |")
    for title, check in zip(CHECKED, checks, strict=True):
        print(f"| check: {title} | {check - imported:.2f} s | {CHECK_BOUND} s |")
    bound = CHECK_BOUND + STEP_BOUND
    print(f"| first step: digits, KD | {step - imported:.2f} s | {bound} s |")
    print(f"\nimporting torch: {imported:.2f} s")


if __name__ == "__main__":
    main()
