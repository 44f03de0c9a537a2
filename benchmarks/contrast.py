"""What CRD's loss costs, beside torchdistill's.

``losses``: forward and backward with each kind of bank, beside torchdistill's where it is installed
(pip install torchdistill), on the same embeddings and as many negatives. Measured in processes that
keep the pages of large temporaries and in others that get fresh ones, several of each by turns;
printed are the lowest and the highest of the medians that these find, and of the ratios. The floor
is what it takes to move as many bytes as the rows of all negatives have, at the speed of a copy.

``sizes``: set-up and loss for more samples, and what of the set-up the system takes to give the
memory of the banks.

The sides of a measurement take turns, so that whatever slows the machine slows all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

import psutil
import torch
from by_torchdistill import is_installed
from malloc_pages import KEPT_PAGES, add_pages_option, start_again_if_kept
from timing import Work, taking_turns
from torch import Tensor
from torch.nn import functional as F

from distill_crd import CRDLoss

NEGATIVES, WIDTH, CLASSES = 16384, 128, 100
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "bfloat16": {"bank_dtype": torch.bfloat16},
    "shared negatives": {"shared_negatives": True},
    "queue of 16,384": {"queue": NEGATIVES},
}
SIZES = (50_000, 200_000, 400_000, 1_281_167)
THEIRS, FLOOR = "torchdistill", "floor"
PAGES = ("kept", "fresh")
Seconds = Mapping[str, float]
"""By bank, of torchdistill's loss where it is installed, and of the floor."""


class Labels:
    """Black images with labels."""

    def __init__(self, size: int):
        self.targets = torch.arange(size) % CLASSES

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 32, 32), int(self.targets[index])


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


def measure_losses(batch: int, turns: int, device: torch.device) -> Seconds:
    """Measure all losses and the floor in this process."""
    size = SIZES[0]
    names, tasks = list(OPTIONS), [ours(size, batch, device, **o) for o in OPTIONS.values()]
    if is_installed():
        tasks.append(reference(size, batch, device))
        names.append(THEIRS)
    seconds = dict(zip(names, taking_turns(tasks, turns, device), strict=True))
    return {**seconds, FLOOR: floor(batch, device)}


def losses_apart(pages: str, options: argparse.Namespace) -> Seconds:
    """Return what ``measure_losses`` finds in a process of its own."""
    others = {name: value for name, value in os.environ.items() if name not in KEPT_PAGES}
    command = [sys.executable, __file__, "--measure", "--turns", str(options.turns)]
    command += ["--batch-size", str(options.batch_size), "--device", options.device]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**others, **(KEPT_PAGES if pages == "kept" else {})},
    )
    found: Seconds = json.loads(done.stdout)
    return found


def compare_losses(options: argparse.Namespace) -> None:
    """Print what the loss costs with each kind of bank, beside torchdistill's."""
    found: dict[str, list[Seconds]] = {pages: [] for pages in PAGES}
    for _ in range(options.runs):
        for pages, runs in found.items():
            runs.append(losses_apart(pages, options))
    print("| banks | pages kept | of torchdistill's | fresh pages | of torchdistill's |")
    print("| ----- | ---------: | ----------------: | ----------: | ----------------: |")
    for bank in OPTIONS:
        cells = [cell for runs in found.values() for cell in _cells(bank, runs)]
        print(f"| {bank} | {' | '.join(cells)} |")
    every = [run for runs in found.values() for run in runs]
    least = _span([run[FLOOR] * 1e3 for run in every], "", 1)
    single, half = "float32", "bfloat16"
    of_single = _span([run[single] / run[FLOOR] for run in every], "", 1)
    of_half = _span([run[half] / run[FLOOR] * 2 for run in every], "", 1)
    print(
        f"\n{SIZES[0]:,} samples, batches of {options.batch_size}; each span is of {options.runs} "
        f"processes. To move as many bytes as all negatives have takes {least} ms, half of it in "
        f"{half}; the loss takes {of_single} times as long with {single}, {of_half} with {half}."
    )


def _cells(bank: str, runs: Sequence[Seconds]) -> tuple[str, str]:
    """Return the time of a loss, and what part of torchdistill's it is."""
    time = f"{_span([run[bank] * 1e3 for run in runs])} ms"
    if THEIRS not in runs[0]:
        return time, ""
    return time, _span([run[THEIRS] / run[bank] for run in runs], "1/", 1)


def _span(values: Sequence[float], before: str = "", digits: int = 0) -> str:
    """Return the lowest and the highest value, or one where both look the same."""
    low, high = (f"{before}{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def compare_sizes(options: argparse.Namespace) -> None:
    """Print what the loss and its set-up cost for more samples."""
    batch, turns, device = options.batch_size, options.turns, torch.device(options.device)
    print("| samples | set-up | first touch alone | beyond the banks | loss | of it drawing |")
    print("| ------: | -----: | ----------------: | ---------------: | ---: | ------------: |")
    student, teacher = _sides(batch, device)
    for size in SIZES:
        labels, loss = Labels(size), CRDLoss(NEGATIVES)
        touched = first_touch(2 * size * WIDTH, device)
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
            f"| {size:,} | {taken:.2f} s | {touched:.2f} s | {beyond / 1e6:,.0f} MB "
            f"| {whole * 1e3:.0f} ms | {drawing * 1e3:.0f} ms |",
            flush=True,
        )


def first_touch(numbers: int, device: torch.device) -> float:
    """Return the seconds that all threads take to write to the memory of so many numbers.

    A processor's is given page by page as it is written to, which can take longer than what is
    written; that of other devices is not, and takes 0.
    """
    if device.type != "cpu":
        return 0.0
    memory = torch.empty(numbers)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        started = perf_counter()
        list(threads.map(torch.Tensor.zero_, memory.split(2**21)))
        return perf_counter() - started


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "losses": compare_losses,
    "sizes": compare_sizes,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7, help="turns of each side")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    add_pages_option(parser)
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind, for losses")
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        device = torch.device(options.device)
        print(json.dumps(measure_losses(options.batch_size, options.turns, device)))
        return
    start_again_if_kept(options.pages)
    for name, measure in PARTS.items():
        if options.only in (None, name):
            measure(options)
            print()


if __name__ == "__main__":
    main()
