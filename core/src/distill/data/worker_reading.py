"""Which sample each loader worker is reading, so that one that dies or hangs can be named."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import torch
from torch.utils.data import get_worker_info

IDLE = -1


@dataclass(frozen=True)
class Reading:
    """A row for each worker in memory that all processes share: process id and sample."""

    workers: int
    rows: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = torch.full((self.workers, 2), IDLE, dtype=torch.int64)
        object.__setattr__(self, "rows", rows.share_memory_() if self.workers else rows)

    def note(self, index: int) -> None:
        """Let it be known that this worker reads ``index``, or nothing: ``IDLE``."""
        worker = get_worker_info()
        if worker is not None:
            self.rows.numpy()[worker.id] = os.getpid(), index

    def explain(self, error: str, timeout: float) -> str:
        """Say in which sample the worker that the loader complains of got stuck."""
        match = re.search(r"worker \(pid(?:\(s\))? ([\d, ]+)\)", error)
        rows = [(pid, index) for pid, index in self.rows.tolist() if index != IDLE]
        if match:
            dead = {int(pid) for pid in match[1].split(",")}
            at = [index for pid, index in rows if pid in dead]
            why = error.partition(") ")[2].rstrip(". ").partition(". ")[0].removeprefix("is ")
            return (
                f"a loader worker died{_at(at)} ({why}); the system kills workers that need too "
                "much memory: fewer data.workers need less"
            )
        if "timed out" in error:
            at = [index for _, index in rows]
            return f"no loader worker has answered for {timeout:g} s (data.worker_timeout){_at(at)}"
        return error


def _at(samples: list[int]) -> str:
    if not samples:
        return " between two samples"
    return f" reading sample {' or '.join(map(str, sorted(samples)))}"
