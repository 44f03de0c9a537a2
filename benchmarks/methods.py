"""Every installed method on the same pair of models, data, schedule and seeds.

Prints a table, and writes it with a plot to a folder: accuracy on test data (mean and standard
deviation over seeds), gain over the student alone, time of a step as a multiple of KD's (epochs of
both in turns), and the most memory that the run of a method held.

Weights are those of each method's example or preset, not tuned here; a method whose recipe is for
longer training or larger networks may do better there.

--data digits: the bundled digits, some minutes on two cores. --data cifar10: ResNet-32x4 to
ResNet-8x4 on CIFAR-10, for a GPU; --root names the folder that holds it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from engine import epochs_by_distill
from method_experiments import (
    Document,
    Schedule,
    cifar10,
    cifar10_alone,
    cifar10_teacher,
    digits,
    digits_alone,
)
from method_report import Row, percent, write_report
from timing import taking_turns

import distill
from distill.forked import Forked

KD = "kd"
ALONE = "alone"
TEACHER = "teacher"
RUNS = "runs"
LONGEST = 7 * 24 * 3600
"""Seconds that the runs of a method may take."""

Experiments = Mapping[str, list[Document]]
"""One for each seed, by method."""


@dataclass(frozen=True)
class Outcome:
    """What the runs of an experiment came to.

    Attributes:
        accuracies: stage -> accuracy on test data, by seed.
        memory: the most bytes that the process held, on a GPU there.
    """

    accuracies: Mapping[str, list[float]]
    memory: int

    def of_last(self) -> list[float]:
        """Return the accuracies of the last stage."""
        return list(self.accuracies.values())[-1]

    def student(self) -> str:
        """Return what the last stage's student reached, in words."""
        return percent(self.of_last())


def run_here(files: Sequence[Path], runs: Path) -> Outcome:
    """Run experiments, one for each seed, in this process."""
    accuracies: dict[str, list[float]] = {}
    for file in files:
        for result in distill.run(distill.load(file), runs=runs).stages:
            if "accuracy" in result.test:
                accuracies.setdefault(result.stage, []).append(result.test["accuracy"])
    if torch.cuda.is_available():
        return Outcome(accuracies, torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return Outcome(accuracies, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def run_apart(described: Sequence[Document], folder: Path) -> Outcome | str:
    """Run experiments in a process of their own; return what it wrote where it fails."""
    files = [folder / f"{each['name']}.yaml" for each in described]
    for file, each in zip(files, described, strict=True):
        file.write_text(yaml.safe_dump(each, sort_keys=False), "utf-8")
    told = files[0].with_suffix(".json")
    arguments = ["--run", *map(str, (told, folder / RUNS, *files))]
    process = Forked(__file__, arguments)
    code, written = process.wait(LONGEST)
    process.kill()
    if code:
        return written.strip()[-2000:]
    return Outcome(**json.loads(told.read_text("utf-8")))


def ratios_to_kd(
    experiments: Mapping[str, list[Document]], turns: int
) -> Iterator[tuple[str, float]]:
    """Yield what a step of each method takes, as a multiple of one of KD."""
    for name, described in experiments.items():
        with ExitStack() as stack:
            works: list[tuple[Callable[[], None], int]] = []
            for each in (experiments[KD][0], described[0]):
                folder = Path(stack.enter_context(TemporaryDirectory()))
                works.append(epochs_by_distill(each, folder, stack))
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            plain, own = taking_turns([work for work, _ in works], turns, device)
            yield name, (own / works[1][1]) / (plain / works[0][1])


def compare(
    experiments: Mapping[str, list[Document]], folder: Path, options: argparse.Namespace
) -> None:
    """Run all experiments, measure their steps, and write the report."""

    def told(name: str) -> Outcome | str:
        outcome = run_apart(experiments[name], folder)
        print(
            f"{name}: {outcome.student() if isinstance(outcome, Outcome) else 'failed'}", flush=True
        )
        return outcome

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(experiments, pool.map(told, experiments), strict=True))
    outcomes = {name: outcome for name, outcome in found.items() if isinstance(outcome, Outcome)}
    if ALONE not in outcomes or KD not in outcomes:
        raise SystemExit("\n".join(str(found[name]) for name in (ALONE, KD)))
    measured = {name: experiments[name] for name in outcomes if name != ALONE}
    ratios = dict(ratios_to_kd(measured, options.turns)) if options.turns else {}
    alone = outcomes[ALONE].accuracies[ALONE]
    teacher = next(
        (o.accuracies["teacher"] for o in outcomes.values() if "teacher" in o.accuracies), []
    )
    rows = [
        Row(name, list(outcome.accuracies.values())[-1], ratios.get(name), outcome.memory)
        for name, outcome in outcomes.items()
        if name != ALONE
    ]
    failed = {name: text for name, text in found.items() if isinstance(text, str)}
    write_report(options.out, options.data, rows, alone, teacher, failed)


def experiments_on_digits(schedule: Schedule, folder: Path) -> Experiments:
    """Train teachers and students alone, and return the experiments of all methods and of these."""
    alone = digits_alone(schedule)
    _trained("teachers and students alone", alone, folder)
    return {ALONE: alone, **dict(digits(schedule, folder / RUNS))}


def experiments_on_cifar10(schedule: Schedule, folder: Path, root: Path) -> Experiments:
    """Train the teacher, and return the experiments of all methods and of the student alone."""
    _trained("the teacher", [cifar10_teacher(schedule, root)], folder)
    teacher = folder / RUNS / "teacher" / "teacher" / "last.safetensors"
    return {
        ALONE: cifar10_alone(schedule, root),
        **dict(cifar10(schedule, root, teacher)),
    }


def _trained(what: str, described: Sequence[Document], folder: Path) -> None:
    outcome = run_apart(described, folder)
    if isinstance(outcome, str):
        raise SystemExit(f"{what}: {outcome}")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--epochs", type=int, help="of the student (digits: 40, cifar10: 240)")
    parser.add_argument("--turns", type=int, default=5, help="epochs to time each step by, or 0")
    parser.add_argument("--jobs", type=int, default=2, help="methods that run at once")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="beside kd")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/methods"), help="where the report goes"
    )
    parser.add_argument("--run", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    if options.run:
        told, runs, *files = options.run
        told.write_text(json.dumps(asdict(run_here(files, runs))), "utf-8")
        return
    on_digits = options.data == "digits"
    epochs = options.epochs or (40 if on_digits else 240)
    schedule = Schedule(range(options.seeds), epochs, min(epochs, 15) if on_digits else epochs)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = (
            experiments_on_digits(schedule, folder)
            if on_digits
            else experiments_on_cifar10(schedule, folder, options.root.resolve())
        )
        if unknown := set(options.only or ()) - set(found):
            parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(found)}")
        keep = {KD, ALONE, *(options.only or found)}
        compare({name: found[name] for name in found if name in keep}, folder, options)


if __name__ == "__main__":
    main()
