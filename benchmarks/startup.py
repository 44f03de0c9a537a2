"""What start-up costs: checking a file, and the time until a run's first step.

Each in a fresh process, in turns with two that import torch, whose time is taken off: one ends as
processes do, which takes torch a while, the other at once.
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
IMPORTS = ("import torch", "import torch, os; os._exit(0)")
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
        tasks: list[Work] = [partial(run, "-c", how) for how in IMPORTS]
        tasks += [partial(run, "-m", "distill", "check", str(file)) for file in CHECKED.values()]
        tasks += [partial(first_step, environment)]
        ended, imported, *took = taking_turns(tasks, options.turns, torch.device("cpu"))
    bounds = [CHECK_BOUND] * len(CHECKED) + [CHECK_BOUND + STEP_BOUND]
    titles = [*(f"check: {title}" for title in CHECKED), "first step: digits, KD"]
    print("| | beyond importing torch | and ending | at most |\n| --- | ---: | ---: | ---: |")
    for title, one, bound in zip(titles, took, bounds, strict=True):
        print(f"| {title} | {one - imported:.2f} s | {one - ended:.2f} s | {bound} s |")
    print(f"\nimporting torch: {imported:.2f} s, and ending: {ended:.2f} s")


if __name__ == "__main__":
    main()
