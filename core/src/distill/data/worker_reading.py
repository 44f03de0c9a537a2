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
    """A row for each worker in memory that all processes share.

    It has the process id, the sample that is read, and how many others are read together with it.
    """

    workers: int
    rows: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = torch.full((self.workers, 3), IDLE, dtype=torch.int64)
        object.__setattr__(self, "rows", rows.share_memory_() if self.workers else rows)

    def note(self, index: int, others: int = 0) -> None:
        """Let it be known that this worker reads ``index``, or nothing: ``IDLE``.

        ``others`` is the number of samples that are read together with it.
        """
        worker = get_worker_info()
        if worker is not None:
            self.rows.numpy()[worker.id] = os.getpid(), index, others

    def explain(self, error: Exception, timeout: float) -> str:
        """Say in which sample the worker that the loader complains of got stuck."""
        text = (str(error) or type(error).__name__).splitlines()[0]
        rows = [(pid, tuple(at)) for pid, *at in self.rows.tolist() if at[0] != IDLE]
        if "timed out" in text:
            at = [at for _, at in rows]
            return f"no loader worker has answered for {timeout:g} s (data.worker_timeout){_at(at)}"
        match = re.search(r"worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?([^.]*)", text)
        if match is None and isinstance(error, RuntimeError):
            return text
        dead = {int(pid) for pid in match[1].split(",")} if match else {pid for pid, _ in rows}
        at = [at for pid, at in rows if pid in dead]
        return (
            f"a loader worker died{_at(at)} ({match[2] if match else text}); the system kills "
            "workers that need too much memory: fewer data.workers need less"
        )


def _at(samples: list[tuple[int, int]]) -> str:
    if not samples:
        return " between two samples"
    named = [
        f"{index} or one of {others} read with it" if others else str(index)
        for index, others in sorted(samples)
    ]
    return f" reading sample {' or '.join(named)}"
