"""How every command ends: with a message for the user's mistakes, and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from distill.errors import ConfigError, DistillError, NumericalError, PluginError, UsageError

BUG = 70
RESUMABLE = 75
FOUND_BY_ALL = (ConfigError, NumericalError, PluginError, UsageError)
GOES_ON = "the same command goes on from the end of the last epoch, if one has ended"


class Group(click.Group):
    """Ends every command the same way: a message for the user's mistakes, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DistillError as error:
            _print_error(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                click.echo(f"\nstopped; {GOES_ON}", err=True)
            ctx.exit(RESUMABLE)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # whoever read the output, such as head, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(RESUMABLE)
        except Exception as error:
            rank = os.environ.get("RANK")
            if rank is not None and _is_lost_contact(error):
                click.echo(f"process {rank}: lost contact with the other processes", err=True)
            elif type(error).__name__ == "OutOfMemoryError":  # torch's, known without importing it
                text = str(error).split(". ")[0]
                click.echo(f"error: {text}; a smaller data.batch_size needs less", err=True)
            else:
                traceback.print_exc()
                click.echo("this is a bug of distill or of a plugin; please report it", err=True)
            ctx.exit(BUG)


@contextmanager
def told_if_ended(text: str) -> Iterator[None]:
    """Say ``text`` on SIGTERM, which schedulers send, before the process ends by it as ever.

    It ends when what torch computes at the moment is done, as on Ctrl+C. Not in one of several
    processes: while it waits for the others nothing of Python's is reached, and what started them,
    which would wait for it in turn, can say it once for all.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if "RANK" in os.environ or not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() == own:  # and not a worker that was forked
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, f"\nended by SIGTERM; {text}\n".encode())  # click may be writing
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another process, which says why, has ended."""
    text = str(error)
    signs = ("Connection closed", "Connection reset", "gloo", "NCCL", "TCPStore", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _print_error(error: DistillError) -> None:
    """Print a message once: what is wrong with a file, or a gradient, every process finds."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        click.echo(f"{_heading(error)}{error}", err=True)
    elif error.of_one_process or not isinstance(error, FOUND_BY_ALL):
        click.echo(f"process {rank}: {error}", err=True)


def _heading(error: DistillError) -> str:
    return "" if getattr(error, "faults", None) else "error: "
