"""Several processes that train together, without torchrun."""

from __future__ import annotations

import os
import socket

from distill.forked import Forked

PROCESS_TIMEOUT = 300
"""Seconds after which ``run_processes`` gives up, far more than tests take on a slow machine."""


def run_processes(script: str | os.PathLike[str], *arguments: str, processes: int = 2) -> None:
    """Run a Python script in several processes that find each other as under torchrun.

    In the script, ``distill.run`` or ``distill.distributed.join`` joins them.

    Raises:
        RuntimeError: with what it wrote, if one of them fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    started = [
        Forked(
            str(script),
            arguments,
            {**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in map(str, range(processes))
    ]
    try:
        ended = [process.wait(PROCESS_TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [text for code, text in ended if code]
    if failed:
        raise RuntimeError("\n".join(failed))
