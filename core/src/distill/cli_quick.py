"""How commands that end soon start: without torch's compiler, and without collecting garbage."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.without_dynamo import without_dynamo

MAIN = Path(__file__).with_name("__main__.py")
SCRIPTS = {Path(sys.executable or "python").with_name(f"distill{end}") for end in ("", ".exe")}
"""What a process runs that is a command alone; others, such as tests, go on behind it."""


@contextmanager
def quick() -> Iterator[None]:
    """Import what a command needs, and do its work, in less time; a decorator too.

    Collections find next to nothing while modules are imported, and look through all of torch; so
    do those of a process that ends. A process that is this command alone collects no more, unless
    the command itself turns that on.
    """
    program = Path(sys.argv[0])
    alone = program == MAIN or program in SCRIPTS
    if alone:
        atexit.register(_end_quickly)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with without_dynamo():
            yield
    finally:
        if was_enabled and not alone:
            gc.enable()


def _end_quickly() -> None:
    # Triton, which comes with torch's compiler, would complain of what is not collected.
    if "triton" not in sys.modules:
        gc.freeze()
