"""Start several processes of one command on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

RESUMABLE = 75
"""Exit code of a command that was stopped and that goes on when it is given again."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``python -m distill <arguments>`` in ``processes`` processes; return an exit code."""
    # Without this, torch's shared store makes some groups fail to form.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The processes say themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    at_end = signal.getsignal(signal.SIGTERM)
    try:
        elastic_launch(config, sys.executable)("-m", "distill", *arguments)
    except SignalException as error:  # of which the processes were told too
        if error.sigval == signal.SIGTERM:
            signal.signal(signal.SIGTERM, at_end)  # torch has put its own in its place
            signal.raise_signal(signal.SIGTERM)
        return RESUMABLE
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 70
    return 0


def without_processes(arguments: Sequence[str]) -> list[str]:
    """Return the command line for one of several processes."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--processes="):
            skip = False
        elif argument == "--processes":
            skip = True
        else:
            kept.append(argument)
    return kept
