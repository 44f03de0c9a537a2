"""Who has a store open: what is in use is not removed.

A lock on the description of a store, shared by all who read and write it, which the system lets go
of when a process ends in whatever way. Where a disk knows no locks, nobody seems to use anything.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO

if sys.platform != "win32":
    import fcntl

WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
PATIENCE, PAUSE = 0.3, 0.01
"""Seconds: others keep a file to themselves for much less, to look whether it is in use."""


def hold(file: Path) -> IO[bytes] | None:
    """Say that a file is in use, until ``let_go`` of what is returned; ``None`` if that fails."""
    try:
        opened = file.open("rb")
    except OSError:
        return None
    _is_locked(opened, alone=False)
    return opened


def let_go(opened: IO[bytes]) -> None:
    """Say that a file is not in use any more, though a forked process may have it open too."""
    if sys.platform != "win32" and not opened.closed:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)
    opened.close()


@contextmanager
def kept_to_itself(file: Path) -> Iterator[bool]:
    """Keep others from using a file for as long as the context lasts; yield whether nobody does."""
    try:
        opened = _opened(file)
    except OSError:
        yield True
        return
    with opened:
        yield _is_locked(opened, alone=True)


def is_held(file: Path) -> bool:
    """Whether somebody, this process too, says that a file is in use."""
    with kept_to_itself(file) as is_free:
        return not is_free


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("r+b")  # which a disk in a network needs of who wants it alone
    except OSError:
        return file.open("rb")


def _is_locked(opened: IO[bytes], *, alone: bool) -> bool:
    """Lock a file; whether that succeeded, or cannot fail."""
    if sys.platform == "win32":
        return True
    until = monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(opened, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if monotonic() > until:
                return False
        except OSError as error:
            return error.errno in WITHOUT_LOCKS
        sleep(PAUSE)
