"""What the loop costs: distillation by `distill run`, by hand and by torchdistill, step by step.

All sides train the same models on the same batches in memory, a few steps in turn, so that
whatever slows the machine slows all. Printed are medians of the time of a step, their ratio to the
loop by hand, and the peak memory of processes that run one side only. torchdistill takes part where
it is installed and has what a case wants.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import perf_counter
from typing import Any

import psutil
import torch
import torch.distributed as dist
from by_torchdistill import by_torchdistill, is_installed
from engine import by_distill
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distill.data.batch import Batch
from distill.distributed import rank, world_size

TEMPERATURE, ALPHA, CLASSES = 4.0, 0.5, 10
SHORT = 10
"""Steps a turn; cases with more are of models too small for their memory to be seen."""
HOOKED = ["layer1", "layer2", "layer3", "layer4"]
PROCESSES = 3
"""In so many, one after the other, peak memory is measured."""
Train = Callable[[list[Batch]], None]


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        models: teacher and student, as components of a file.
        shape: batches, samples a batch, shape of a sample.
        steps: of each side in a turn.
        precision: of both models.
        compiled: whether torch compiles both.
        hooked: layers of both that are compared by their mean squares too.
        processes: that share a batch.
    """

    models: tuple[Mapping[str, Any], Mapping[str, Any]]
    shape: tuple[int, ...]
    steps: int = 2
    precision: str = "fp32"
    compiled: bool = False
    hooked: list[str] = field(default_factory=list)
    processes: int = 1


def _resnet(depth: int) -> dict[str, Any]:
    return {"type": f"resnet{depth}", "params": {"num_classes": CLASSES}}


def _linear() -> dict[str, Any]:
    return {"type": "TinyLinear"}


RESNETS = (_resnet(34), _resnet(18))
IMAGES = (4, 32, 3, 64, 64)
CASES = {
    "ResNet-34 to ResNet-18, 64x64, batch 32": Case(RESNETS, IMAGES),
    "the same, bf16": Case(RESNETS, IMAGES, precision="bf16"),
    "the same, compiled": Case(RESNETS, IMAGES, compiled=True),
    "the same, hooks on four layers": Case(RESNETS, IMAGES, hooked=HOOKED),
    "the same, two processes": Case(RESNETS, IMAGES, processes=2),
    "linear to linear, batch 8": Case((_linear(), _linear()), (4, 8, 16), steps=400),
}


class TinyLinear(nn.Linear):
    """A model so small that a step is all overhead."""

    def __init__(self) -> None:
        super().__init__(16, CLASSES)


def by_hand(case: Case, device: torch.device) -> Train:
    """Return a function that trains on batches as a script of one's own would."""
    teacher, student = (_built(model).to(device) for model in case.models)
    seen: dict[str, Tensor] = {}
    for layer in case.hooked:
        for side, model in (("t", teacher), ("s", student)):
            module, name = model.get_submodule(layer), side + layer
            module.register_forward_hook(_kept(seen, name))
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    teacher.eval().requires_grad_(False)
    student.train()
    if case.compiled:
        teacher.compile()
        student.compile()
    called: nn.Module = DistributedDataParallel(student) if case.processes > 1 else student
    reduced = case.precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16) if reduced else nullcontext()

    def train(batches: list[Batch]) -> None:
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            with autocast:
                with torch.no_grad():
                    expected = teacher(inputs)
                logits = called(inputs)
            expected, logits = expected.float(), logits.float()
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1),
                F.softmax(expected / TEMPERATURE, 1),
                reduction="batchmean",
            )
            loss = ALPHA * F.cross_entropy(logits, targets) + (1 - ALPHA) * TEMPERATURE**2 * soft
            for layer in case.hooked:
                loss = loss + F.mse_loss(seen["s" + layer].float(), seen["t" + layer].float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            seen.clear()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return train


def _kept(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[name] = output

    return hook


def _built(described: Mapping[str, Any]) -> nn.Module:
    import torchvision

    if described["type"] == "TinyLinear":
        return TinyLinear()
    model: nn.Module = getattr(torchvision.models, described["type"])(**described["params"])
    return model


def of_distill(case: Case, device: torch.device, folder: Path, stack: ExitStack) -> Train:
    """Return a function that trains on batches as a stage does."""
    teacher, student = case.models
    kd = {"type": "KDLoss", "params": {"temperature": TEMPERATURE, "alpha": ALPHA}}
    hints = {
        layer: {
            "type": "MSELoss",
            "inputs": {"input": f"student.{layer}", "target": f"teacher.{layer}"},
        }
        for layer in case.hooked
    }
    _, size, *shape = case.shape
    described = {
        "name": "loop",
        "device": str(device),
        "log_every": 1_000_000,
        "datasets": {"train": {"type": "Noise", "params": {"size": 2 * size, "shape": shape}}},
        "models": {"teacher": dict(teacher), "student": dict(student)},
        "stages": [
            {
                "name": "kd",
                "epochs": 1,
                "data": {"train": "train", "batch_size": size},
                "teacher": {"model": "teacher"},
                "student": {"model": "student"},
                "criterion": {"kd": kd, **hints},
                "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}},
                "precision": case.precision,
                "sync_batchnorm": False,  # as by hand
                "compile": ["teacher", "student"] if case.compiled else [],
                "metrics": [],
            }
        ],
        "observers": [],
    }
    more = {"models": {"TinyLinear": TinyLinear}}
    return by_distill(described, folder, stack, {"Noise": Noise}, **more)


class Noise(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Noise with labels."""

    def __init__(self, size: int, shape: list[int]):
        self.inputs = torch.randn(size, *shape)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], index % CLASSES


def batches_of(case: Case) -> list[Batch]:
    """Return batches of noise with labels, of this process's size."""
    count, size, *shape = case.shape
    size //= world_size()
    sizes = (size,) * world_size() if world_size() > 1 else ()
    return [
        Batch(
            torch.randn(size, *shape),
            torch.randint(CLASSES, (size,)),
            torch.arange(size),
            sizes=sizes,
        )
        for _ in range(count)
    ]


def sides_of(case: Case, device: torch.device, stack: ExitStack) -> dict[str, Callable[[], Train]]:
    """Return how to make the sides, by name."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    sides: dict[str, Callable[[], Train]] = {
        "hand": lambda: by_hand(case, device),
        "distill": lambda: of_distill(case, device, folder, stack),
    }
    # torchdistill's box spreads a model over processes on CUDA alone, and these are on the CPU.
    if is_installed() and case.processes == 1:
        sides["torchdistill"] = lambda: _by_torchdistill(case, device)
    return sides


def _by_torchdistill(case: Case, device: torch.device) -> Train:
    teacher, student = (_built(model).to(device) for model in case.models)
    if case.compiled:
        teacher.compile()
        student.compile()
    reduced = case.precision == "bf16"
    settings = TEMPERATURE, ALPHA, case.hooked
    return by_torchdistill(teacher, student, device, *settings, reduced=reduced)


def compare(case: Case, device: torch.device, turns: int) -> dict[str, float]:
    """Return the median seconds of a step of each side, taking turns."""
    endless = cycle(batches_of(case))
    with ExitStack() as stack:
        sides: dict[str, Train] = {}
        for name, make in sides_of(case, device, stack).items():
            torch.manual_seed(0)
            sides[name] = make()
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns + 1):
            chosen = list(islice(endless, case.steps))
            names = list(sides)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if world_size() > 1:
                    dist.barrier()
                started = perf_counter()
                sides[name](chosen)
                if turn:  # the first warms up
                    times[name].append((perf_counter() - started) / case.steps)
    return {name: median(found) for name, found in times.items()}


def peak(name: str, which: str, device: str) -> float:
    """Return the MB that a process takes at most which runs one side only."""
    command = [sys.executable, __file__, "--device", device, "--memory", which, "--case", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure_peak(case: Case, which: str, device: torch.device) -> float:
    """Return what ``peak`` asks a process for."""
    with ExitStack() as stack:
        side = sides_of(case, device, stack)[which]()
        batches = batches_of(case)
        if device.type == "cuda":
            side(batches[:3])
            return torch.cuda.max_memory_allocated(device) / 1e6
        with _Sampled() as sampled:
            side(batches[:3])
        return sampled.most / 1e6


class _Sampled:
    """Looks at the memory of this process every millisecond, beside what it had before."""

    def __enter__(self) -> _Sampled:
        self._process, self._is_over = psutil.Process(), Event()
        self._before = self._process.memory_info().rss
        self.most = 0
        self._thread = Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._is_over.wait(0.001):
            self.most = max(self.most, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def _in_processes(name: str, turns: int, processes: int) -> Iterator[str]:
    """Measure a case in several processes; yield what the first one prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, "--case", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--turns", str(turns)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    yield from (line for line in done.stdout.splitlines() if line.startswith("| the"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=15, help="turns of each side")
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--memory", metavar="SIDE", help="only the peak memory of this side")
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.memory:
        print(measure_peak(CASES[given.case], given.memory, device))
        return
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if rank() == 0 and not given.case:
        print("| work | by hand | distill | torchdistill | distill : hand | memory : hand's |")
        print("| ---- | ------: | ------: | -----------: | -------------: | --------------: |")
    for name, case in CASES.items():
        if given.case not in (None, name):
            continue
        if case.processes > 1 and "RANK" not in os.environ:
            print("\n".join(_in_processes(name, given.turns, case.processes)), flush=True)
            continue
        found = compare(case, device, given.turns)
        # What a compiler takes, and what a tiny model does, hide what the loop takes.
        is_seen = case.steps <= SHORT and case.processes == 1 and not case.compiled
        memory = _memory(name, given.device) if is_seen else ""
        if rank() == 0:
            cells = [_time(found.get(side)) for side in ("hand", "distill", "torchdistill")]
            ratio = found["distill"] / found["hand"]
            print(f"| {name} | {' | '.join(cells)} | {ratio:.3f} | {memory} |", flush=True)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _memory(name: str, device: str) -> str:
    found = {
        side: median(peak(name, side, device) for _ in range(PROCESSES))
        for side in ("hand", "distill")
    }
    return f"{found['distill'] / found['hand']:.3f}"


if __name__ == "__main__":
    main()
