"""What losses on the logits of large vocabularies cost in memory and time, beside plain formulas.

Each runs forward and backward in a process of its own, whose peak of resident memory is compared
with what it holds before: logits of both sides. The gradient of the student's is a third such
tensor that any loss must give. Printed is what the peak is beyond these, and the median of times.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch
from timing import taking_turns
from torch import Tensor
from torch.nn import functional as F

from distill_kd import KDLoss
from distill_kd.jensen_shannon import JensenShannonLoss

TEMPERATURE = 2.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Loss = Callable[[Tensor, Tensor], Tensor]


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence as one would write it, in float32."""
    ours = (student.float() / TEMPERATURE).log_softmax(-1)
    theirs = (teacher.float() / TEMPERATURE).softmax(-1)
    found = F.kl_div(ours, theirs, reduction="none").sum(-1).mean()
    return found * TEMPERATURE**2


def plain_jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence as TRL writes it, in float32."""
    ours = (student.float() / TEMPERATURE).log_softmax(-1)
    theirs = (teacher.float() / TEMPERATURE).log_softmax(-1)
    half = torch.log(torch.tensor(0.5))
    mixture = torch.stack([ours + half, theirs + half]).logsumexp(0)
    of_teacher = F.kl_div(mixture, theirs, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, ours, reduction="none", log_target=True)
    return (0.5 * of_teacher + 0.5 * of_student).sum(-1).mean()


LOSSES: Mapping[str, Callable[[], Loss]] = {
    "KDLoss": lambda: KDLoss(TEMPERATURE, alpha=0.0, reduction="positionmean"),
    "KL, plain": lambda: plain_kl,
    "JensenShannonLoss": lambda: JensenShannonLoss(0.5, TEMPERATURE),
    "Jensen-Shannon, plain": lambda: plain_jensen_shannon,
}


def measure(name: str, dtype: str, shape: tuple[int, int, int], turns: int) -> None:
    """Run a loss in this process, and write what it took as JSON: bytes, seconds, and its value."""
    torch.manual_seed(0)
    student = torch.randn(shape).to(DTYPES[dtype]).requires_grad_()
    teacher = torch.randn(shape).to(DTYPES[dtype])
    loss = LOSSES[name]()
    there_and_back(loss, student[:1, :1].detach().requires_grad_(), teacher[:1, :1])
    reset_peak()
    before = peak()
    value = there_and_back(loss, student, teacher)
    taken = peak() - before
    (seconds,) = taking_turns(
        [partial(there_and_back, loss, student, teacher)], turns, torch.device("cpu")
    )
    print(json.dumps({"bytes": taken, "seconds": seconds, "value": value}))


def there_and_back(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    """Run a loss forward and backward, and return its value."""
    value = loss(student, teacher)
    # Not backward, which would copy a leaf's gradient; logits of a model are none.
    torch.autograd.grad(value, student)
    return value.item()


def reset_peak() -> None:
    """Let the kernel count the peak of memory anew, where it can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        print("the peak includes what was made before", file=sys.stderr)


def peak() -> int:
    """Return the largest number of bytes that this process has had in memory."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(shape: tuple[int, int, int], turns: int) -> None:
    """Print a row for each loss and precision."""
    print(
        f"logits {' x '.join(f'{size:,}' for size in shape)}, {torch.get_num_threads()} threads\n"
    )
    print("| loss | logits | logits and gradient | beyond | beyond, of one side's logits | time |")
    print("| ---- | ------ | ------------------: | -----: | ---------------------------: | ---: |")
    for dtype, kind in DTYPES.items():
        side = torch.Size(shape).numel() * kind.itemsize
        for name in LOSSES:
            found = in_its_own_process(name, dtype, shape, turns)
            beyond = found["bytes"] - side
            print(
                f"| {name} | {dtype} | {3 * side / 1e6:,.0f} MB | {beyond / 1e6:,.0f} MB "
                f"| {beyond / side:.1f} | {found['seconds']:.2f} s |",
                flush=True,
            )


def in_its_own_process(
    name: str, dtype: str, shape: tuple[int, int, int], turns: int
) -> dict[str, float]:
    """Return what ``measure`` writes in a new process."""
    command = [sys.executable, __file__, "--turns", str(turns), "--of", name, dtype]
    command += ["--shape", *map(str, shape)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="turns of each loss")
    parser.add_argument("--shape", type=int, nargs=3, default=[2, 256, 128_000], help="B, T and V")
    parser.add_argument("--of", nargs=2, metavar=("LOSS", "DTYPE"), help="measure one, as JSON")
    options = parser.parse_args()
    shape = tuple(options.shape)
    if options.of:
        name, dtype = options.of
        measure(name, dtype, shape, options.turns)
    else:
        report(shape, options.turns)


if __name__ == "__main__":
    main()
