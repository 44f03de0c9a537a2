"""Works measured in turns, so that whatever slows the machine slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch

Work = Callable[[], object]


def taking_turns(
    tasks: Sequence[Work], turns: int, device: torch.device, *, warms_up: bool = True
) -> list[float]:
    """Return the median seconds of each task, which are measured as ``in_turns`` does."""
    return [median(each) for each in in_turns(tasks, turns, device, warms_up=warms_up)]


def in_turns(
    tasks: Sequence[Work],
    turns: int,
    device: torch.device,
    *,
    warms_up: bool = True,
    before: Work = lambda: None,
) -> list[list[float]]:
    """Return the seconds of each task in each turn; each turn starts with another task.

    Args:
        tasks: what is measured.
        turns: so many of each task count.
        device: which is waited for.
        warms_up: whether a turn comes before that does not count.
        before: is done before each task, and does not count.
    """
    times: list[list[float]] = [[] for _ in tasks]
    for turn in range(turns + warms_up):
        for place in range(len(tasks)):
            number = (place + turn) % len(tasks)
            before()
            started = perf_counter()
            tasks[number]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warms_up:
                times[number].append(perf_counter() - started)
    return times


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios of each turn, whose tasks a slow minute slows alike."""
    return median(a / b for a, b in zip(one, other, strict=True))
