"""Memory that is asked for in one piece: told, and refused with words, before it is allocated."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from distill.distributed import is_main

_LIMIT = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")
_told: set[str] = set()


def claim(nbytes: int, device: torch.device, what: str, otherwise: str = "") -> None:
    """Print how much memory something is about to take, once; to be called before it is allocated.

    Args:
        nbytes: bytes that it takes.
        device: where.
        what: it is, in the plural: ``banks of 50,000 x 128 float32``.
        otherwise: what would need less.

    Raises:
        ValueError: if more is asked for than is free; it says how much is missing.
    """
    free = free_memory(device)
    text = f"{what} take {_size(nbytes)} on {device}"
    if free is not None:
        text += f", where {_size(free)} are free"
        if nbytes > free:
            advice = f"; {otherwise}" if otherwise else ""
            raise ValueError(f"{text}: {_size(nbytes - free)} are missing{advice}")
    if is_main() and what not in _told:
        print(text, file=sys.stderr, flush=True)
        _told.add(what)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes a device has left, ``None`` where it does not tell.

    On the CPU also what a control group, such as a container's, leaves of its limit.
    """
    if device.type == "cuda":
        # What torch has taken from the device and does not use serves as well.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu":
        return None
    free = psutil.virtual_memory().available
    try:
        return min(free, int(_LIMIT.read_text()) - int(_USED.read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return free


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes / 1000:,.1f} kB"
