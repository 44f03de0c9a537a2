"""Who has a store open: what is in use is not removed.

A lock on the description of a store, shared by all who read and write it, which the system lets go
of when a process ends in whatever way. Where a disk knows no locks, nobody seems to use anything.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl


def hold(file: Path) -> IO[bytes] | None:
    """Say that a file is in use for as long as what is returned is open; ``None`` if that fails."""
    try:
        opened = file.open("rb")
    except OSError:
        return None
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return opened


def is_held(file: Path) -> bool:
    """Whether somebody, this process too, says that a file is in use."""
    try:
        opened = file.open("rb")
    except OSError:
        return False
    with opened:
        if sys.platform != "win32":
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return False
    return False
