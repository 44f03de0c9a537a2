"""A gradient that is not finite: noticed before it is followed, and what it comes from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill import distributed
from distill.data.batch import map_tensors
from distill.data.source import Source
from distill.errors import DataError, DistillError, NumericalError
from distill.model.criterion import TOTAL
from distill.training import sharding

MOST_SAMPLES_SHOWN = 16
LAG = 2
"""Steps that a device may be behind before anybody waits for what it found."""
SMALLEST_SCALE = 2.0**-10
"""A gradient that overflows fp16 though the loss is scaled down so far is no overflow."""


@dataclass(slots=True)
class Seen:
    """One batch of a step: its losses by name, its samples, and whether it counts."""

    losses: Mapping[str, torch.Tensor]
    index: torch.Tensor
    counts: bool = True


class NonFinite(DistillError):
    """The gradient of a step, which counts from 1, is not finite; raised on every process.

    If ``late``, further steps have been taken since.
    """

    def __init__(self, step: int, seen: Sequence[Seen], *, late: bool = False):
        self.step = step
        self.seen = seen
        self.late = late
        super().__init__(f"the gradient of step {step} is not finite")


class Verdicts:
    """What the device found of gradients, read so much later that nobody waits for it.

    Every process reads at the same steps, so that all of them end at the same one.

    Attributes:
        overflows: steps whose gradient overflowed fp16, of those that have been judged.
    """

    def __init__(self) -> None:
        self.overflows = 0
        self._open: deque[tuple[int, list[Seen], torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, seen: Sequence[Seen], found: torch.Tensor) -> None:
        """Note what will be found of a step, and judge the one that is some steps old.

        Args:
            step: counted from 1.
            seen: its batches.
            found: on the device, above 0 if the gradient is not finite, and the loss's scale, (2).

        Raises:
            NonFinite: if the gradient of the older one was not finite and that is no overflow.
        """
        kept = [Seen({n: v.detach() for n, v in b.losses.items()}, b.index, b.counts) for b in seen]
        event = None
        if found.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            found, event = host.copy_(found, non_blocking=True), torch.cuda.Event()
            event.record()
        self._open.append((step, kept, found, event))
        if len(self._open) > LAG:
            self._judge()

    def settle(self) -> None:
        """Judge all steps so far.

        Raises:
            NonFinite: if the gradient of one was not finite and that is no overflow.
        """
        while self._open:
            self._judge()

    def _judge(self) -> None:
        step, seen, found, event = self._open.popleft()
        if event is not None:
            event.synchronize()
        is_bad, scale = found.tolist()
        if not is_bad:
            return
        if not is_overflow(scale) or not losses_are_finite(seen):
            raise NonFinite(step, seen, late=True)
        self.overflows += 1


def is_overflow(scale: float) -> bool:
    """Whether a gradient that is not finite may be due to the loss's scale, 0 without a scaler."""
    return scale >= SMALLEST_SCALE


def losses_are_finite(seen: Sequence[Seen]) -> bool:
    """Whether every loss of a step is finite on every process."""
    device = seen[0].losses[TOTAL].device
    bad = sum(1 for batch in seen if not math.isfinite(batch.losses[TOTAL].item()))
    return bool(distributed.sum_over_ranks(torch.tensor([float(bad)]), device).item() == 0)


def explanation(
    error: NonFinite, stage: str, trained: Mapping[str, nn.Module], source: Source
) -> NumericalError:
    """Say in which step, process, term and samples it began; every process must ask.

    Args:
        error: what was noticed.
        stage: its name.
        trained: what the stage trains, by name, with the gradients of the step.
        source: where the samples come from.
    """
    ranks = distributed.gather_objects(_findings(error.seen, source))
    found = [(rank, finding) for rank, findings in enumerate(ranks) for finding in findings]
    # Through BatchNorm over all processes one bad input makes every process's losses bad.
    culprits = [(rank, finding) for rank, finding in found if finding["inputs"]] or found
    lines = [_line(rank, finding) for rank, finding in culprits]
    if not lines:
        lines = [UNKNOWN if error.late else _gradient_line(trained)]
    before = LATE if error.late else IN_TIME
    return NumericalError(
        f"stage '{stage}', step {error.step}: {'; '.join(lines)}. {before} If the data is "
        "right, a lower learning rate, clip.norm or precision: fp32 may help"
    )


LATE = "The last checkpoint is from before."
IN_TIME = "This step was not followed, and the last checkpoint is from before."
UNKNOWN = "every term is finite, a gradient or the norm that clip.norm needs is not"
"""What can be said once the gradients of the step are gone."""


def _findings(seen: Sequence[Seen], source: Source) -> list[dict[str, Any]]:
    findings = []
    for batch in seen:
        values = {name: loss.item() for name, loss in batch.losses.items()}
        bad = {n: v for n, v in values.items() if not math.isfinite(v) and n != TOTAL}
        if batch.counts and not math.isfinite(values[TOTAL]):
            samples = batch.index.tolist()
            unreadable = [index for index in samples if not _is_finite(source, index)]
            findings.append({"terms": bad, "samples": samples, "inputs": unreadable})
    return findings


def _is_finite(source: Source, index: int) -> bool:
    """Whether everything in a sample's input is finite."""
    try:
        value = source.read(index).input
    except DataError:
        return True
    flags: list[bool] = []
    map_tensors(lambda t: flags.append(bool(torch.isfinite(t).all())) or t, value)  # type: ignore[func-returns-value]
    return all(flags)


def _line(rank: int, finding: Mapping[str, Any]) -> str:
    terms = " and ".join(f"'{name}' is {value}" for name, value in finding["terms"].items())
    where = f" on rank {rank}" if distributed.world_size() > 1 else ""
    line = f"the term {terms or 'total is not finite'}{where}"
    if finding["inputs"]:
        return f"{line}; the input of {_samples(finding['inputs'])} is not finite"
    return f"{line}, for {_samples(finding['samples'])}"


def _samples(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:MOST_SAMPLES_SHOWN]))
    more = len(indices) - MOST_SAMPLES_SHOWN
    return (
        f"sample{'s' if len(indices) > 1 else ''} {shown}{f' and {more} more' if more > 0 else ''}"
    )


def _gradient_line(trained: Mapping[str, nn.Module]) -> str:
    bad = [
        name
        for owner, module in trained.items()
        for name, parameter in module.named_parameters(prefix=owner)
        if parameter.grad is not None
        and not bool(torch.isfinite(sharding.local_part(parameter.grad)).all())
    ]
    if not bad:
        return (
            "every term and every gradient is finite, but their norm, which clip.norm needs, is not"
        )
    some = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return f"every term is finite, the gradient of {some} is not"
