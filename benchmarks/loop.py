"""What the loop costs: distillation by `distill run`, by hand and by torchdistill, step by step.

All sides train the same models on the same batches in memory, a few steps in turn, so that
whatever slows the machine slows all. Printed are medians of the time of a step, that of the turns'
ratios to the loop by hand, and the peak memory of processes that run one side only. torchdistill
takes part where it is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import psutil
import torch
import torch.distributed as dist
from by_torchdistill import by_torchdistill, is_installed
from engine import Train, by_distill, endlessly
from timing import Work, in_turns, ratio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distill.data.batch import Batch
from distill.distributed import rank, sum_over_ranks, world_size

TEMPERATURE, ALPHA, CLASSES = 4.0, 0.5, 10
SHORT = 10
"""Steps a turn; cases with more are of models too small for their memory to be seen."""
HOOKED = ["layer1", "layer2", "layer3", "layer4"]
PROCESSES = 3
"""In so many, one after the other, peak memory is measured."""


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

    def train(batches: Iterable[Batch]) -> None:
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
    if is_installed():
        sides["torchdistill"] = lambda: _by_torchdistill(case, device)
    return sides


def _by_torchdistill(case: Case, device: torch.device) -> Train:
    teacher, student = (_built(model).to(device) for model in case.models)
    if case.compiled:
        teacher.compile()
        student.compile()
    return by_torchdistill(
        teacher,
        student,
        device,
        TEMPERATURE,
        ALPHA,
        case.hooked,
        reduced=case.precision == "bf16",
        spread=case.processes > 1,
    )


def compare(case: Case, device: torch.device, turns: int) -> dict[str, list[float]]:
    """Return the seconds of a step of each side, turn by turn."""
    batches = batches_of(case)
    with ExitStack() as stack:
        tasks: dict[str, Work] = {}
        for name, make in sides_of(case, device, stack).items():
            torch.manual_seed(0)
            tasks[name] = endlessly(make(), batches, case.steps)
        waits = dist.barrier if world_size() > 1 else lambda: None
        times = in_turns(list(tasks.values()), turns, device, before=waits)
    steps = [[seconds / case.steps for seconds in each] for each in times]
    return dict(zip(tasks, steps, strict=True))


def peak(name: str, which: str, device: str) -> float:
    """Return the MB that processes take at most which run one side only."""
    given = ["--device", device, "--memory", which]
    return float(_in_processes(name, given).split()[-1])


def measure_peak(case: Case, which: str, device: torch.device) -> float:
    """Return what ``peak`` asks processes for, which is what all of them take.

    That is beside what a process has before its first step; or where a compiler leaves much behind
    in that step, beside what it has before later ones, the median of several times.
    """
    with ExitStack() as stack:
        side = sides_of(case, device, stack)[which]()
        batches = batches_of(case)
        if case.compiled:
            side(batches[:3])
        if device.type == "cuda":
            side(batches[:3])
            return torch.cuda.max_memory_allocated(device) / 1e6
        found = [_most_beyond(side, batches[:3]) for _ in range(9 if case.compiled else 1)]
        return sum_over_ranks(torch.tensor([median(found)]), device).item()


def _most_beyond(train: Train, batches: list[Batch]) -> float:
    """Return the MB that training takes at most beside what is in use before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with _Sampled() as sampled:
        train(batches)
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


def _in_processes(name: str, arguments: list[str]) -> str:
    """Measure a case in processes of its own; return what the first one prints."""
    processes = CASES[name].processes
    command, environment = [sys.executable], dict(os.environ)
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
        environment["OMP_NUM_THREADS"] = "1"
    command += [__file__, "--case", name, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=31, help="turns of each side")
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--memory", metavar="SIDE", help="only the peak memory of this side")
    given = parser.parse_args()
    device = torch.device(given.device)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if given.memory:
        most = measure_peak(CASES[given.case], given.memory, device)
        if rank() == 0:
            print(most)
        return
    if "RANK" not in os.environ and not given.case:
        print("| work | by hand | distill | torchdistill | distill : hand | memory : hand's |")
        print("| ---- | ------: | ------: | -----------: | -------------: | --------------: |")
    for name, case in CASES.items():
        if given.case not in (None, name):
            continue
        if "RANK" in os.environ:
            found = compare(case, device, given.turns)
            if rank() == 0:
                print(json.dumps(found))
            continue
        if case.processes > 1:
            printed = _in_processes(name, ["--turns", str(given.turns)])
            found = json.loads(printed.splitlines()[-1])
        else:
            found = compare(case, device, given.turns)
        # What a tiny model takes hides what the loop does.
        memory = _memory(name, given.device) if case.steps <= SHORT else ""
        cells = [_time(found.get(side)) for side in ("hand", "distill", "torchdistill")]
        to_hand = ratio(found["distill"], found["hand"])
        print(f"| {name} | {' | '.join(cells)} | {to_hand:.3f} | {memory} |", flush=True)


def _time(seconds: list[float] | None) -> str:
    return "" if seconds is None else f"{median(seconds) * 1e3:.3f} ms"


def _memory(name: str, device: str) -> str:
    found = {
        side: median(peak(name, side, device) for _ in range(PROCESSES))
        for side in ("hand", "distill")
    }
    return f"{found['distill'] / found['hand']:.3f}"


if __name__ == "__main__":
    main()
