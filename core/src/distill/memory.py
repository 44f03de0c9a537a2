"""Memory that is asked for in one piece: told, and refused with words, before it is allocated."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from distill.distributed import gather_objects, is_main

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}
"""Of a control group by its version 2, and by version 1: its limit, what it uses, and what of that
are files that have been read, which the system drops where memory is short."""
_told: set[str] = set()


def claim(nbytes: int, device: torch.device, what: str, otherwise: str = "") -> None:
    """Print how much memory something is about to take, once; to be called before it is allocated.

    Of several processes all are to call it, which wait for one another: on a CPU those of a machine
    share its memory.

    Args:
        nbytes: bytes that it takes.
        device: where.
        what: it is, in the plural: ``banks of 50,000 x 128 float32``.
        otherwise: what would need less.

    Raises:
        ValueError: if more is asked for than is free; it says how much is missing.
    """
    free, sharing = free_memory(device), _sharing(device)
    text = f"{what} take {_size(nbytes)} on {device}"
    if sharing > 1:
        text += f" in each of {sharing} processes"
    if free is not None:
        text += f", where {_size(free)} are free"
        if nbytes * sharing > free:
            advice = f"; {otherwise}" if otherwise else ""
            raise ValueError(f"{text}: {_size(nbytes * sharing - free)} are missing{advice}")
    if is_main() and what not in _told:
        print(text, file=sys.stderr, flush=True)
        _told.add(what)


def _sharing(device: torch.device) -> int:
    """Return how many processes ask for as much of the same memory, once all have come so far."""
    own = socket.gethostname()
    machines = gather_objects(own)
    return machines.count(own) if device.type == "cpu" else 1


def free_memory(device: torch.device) -> int | None:
    """Return the bytes a device has left, ``None`` where it does not tell.

    On the CPU that is also what control groups, such as a container's, leave of their limits.
    """
    if device.type == "cuda":
        # What torch has taken from the device and does not use serves as well.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu":
        return None
    return min([psutil.virtual_memory().available, *_left_by_groups()])


def _left_by_groups() -> Iterator[int]:
    """Yield what each control group that this process is in leaves of its limit, if it has one."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # another system than Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in _FILES.keys() & controllers.split(","):
            top = _GROUPS / controller
            own = top / path.lstrip("/")
            # A container may see its own group as the topmost.
            for group in {own, *own.parents, top}:
                if group.is_relative_to(top):
                    yield from _left(group, *_FILES[controller])


def _left(group: Path, limit: str, used: str, files: tuple[str, str]) -> Iterator[int]:
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        dropped = sum(int(counts[name]) for name in files)
        yield int((group / limit).read_text()) - int((group / used).read_text()) + dropped
    except (OSError, ValueError, KeyError):  # no such group, or "max"
        return


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes / 1000:,.1f} kB"
