"""Scripts in processes of their own, forked from one that has imported torch and the plugins.

For tests: to import them anew takes each process seconds.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path


@dataclass
class Forked:
    """A Python script, or a module as with ``python -m``, under way.

    Args:
        target: path of the script, or name of the module.
        arguments: what it finds behind the first in ``sys.argv``.
        environment: its variables, in place of this process's.
        folder: its working folder.
        is_module: whether ``target`` is a module's name.
    """

    target: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str | os.PathLike[str] = "."
    is_module: bool = False

    def __post_init__(self) -> None:
        descriptor, self._told = tempfile.mkstemp()
        os.close(descriptor)
        given = self.target, tuple(self.arguments), dict(self.environment), str(self.folder)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_preloaded())
        self.process: BaseProcess = context.Process(
            target=_enter, args=(*given, self.is_module, self._told), daemon=False
        )
        self.process.start()

    def wait(self, timeout: float) -> tuple[int, str]:
        """Return its exit code and what it wrote; it is killed after so many seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        text = Path(self._told).read_text("utf-8", errors="replace")
        code = self.process.exitcode
        return (1 if code is None else code), text

    def kill(self) -> None:
        """End it, if it has not ended, and forget what it wrote."""
        self.process.kill()
        self.process.join()
        Path(self._told).unlink(missing_ok=True)


def _preloaded() -> list[str]:
    """Return the modules that nearly every script imports; those that are missing are passed."""
    return ["distill.runner", "distill.testing", *(e.value for e in entry_points(group="distill"))]


def _enter(
    target: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    is_module: bool,
    told: str,
) -> None:
    """Become the script, in the new process."""
    written = os.open(told, os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [target, *arguments]
    try:
        if is_module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
            runpy.run_path(target, run_name="__main__")
    finally:
        # The process ends without these, as every forked one of multiprocessing.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
