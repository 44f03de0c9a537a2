"""Runs the experiment of test_stored_stage.py in a process, which may be killed while it fills.

Arguments: the folder; the number of rows after which the process kills itself, if it is to.
"""

import os
import signal
import sys
from pathlib import Path

from test_stored_stage import EXACT, described, run

from distill.store.rows import Rows

folder = Path(sys.argv[1])
if len(sys.argv) > 2:
    write, left = Rows.write, [int(sys.argv[2])]

    def write_or_die(rows: Rows, at, content, fingerprints) -> None:
        """Write rows; once there are enough, half of them, the last one torn, and die."""
        left[0] -= len(at)
        if left[0] > 0:
            write(rows, at, content, fingerprints)
            return
        half = len(at) // 2
        write(rows, at[:half], content[:half], fingerprints[:half])
        rows.rows[at[half], : content.shape[1] // 2] = content[half, : content.shape[1] // 2]
        rows.checks[at[half]] = (fingerprints[half], 1)
        os.kill(os.getpid(), signal.SIGKILL)

    Rows.write = write_or_die
run(described(folder, EXACT))
