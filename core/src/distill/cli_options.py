"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def plugin_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``-p FILE.py``."""
    return click.option(
        "-p",
        "--plugin",
        "plugin_files",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE.py",
        help="Load a local Python file as a plugin; may be given several times.",
    )(command)


def set_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``-s KEY=VALUE``."""
    return click.option(
        "-s",
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a value of the file, e.g. -s stages.kd.optimizer.params.lr=0.1.",
    )(command)


def remote_code_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--allow-remote-code``."""
    return click.option(
        "--allow-remote-code",
        is_flag=True,
        help="Let components fetch code from elsewhere and run it; `distill check` lists them.",
    )(command)


def stores_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--stores DIR``."""
    return click.option(
        "--stores",
        default="stores",
        show_default=True,
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder with stored outputs of teachers.",
    )(command)
