"""How commands that end soon start: without torch's compiler, and without collecting garbage."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from distill.without_dynamo import without_dynamo


@contextmanager
def quick() -> Iterator[None]:
    """Import what a command needs, and do its work, in less time; a decorator too.

    Collections find next to nothing while modules are imported, and look through all of torch; so
    do those of a process that ends.
    """
    atexit.register(gc.freeze)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with without_dynamo():
            yield
    finally:
        if was_enabled:
            gc.enable()
