"""Measures everything and writes the tables into docs/performance.md.

Each table there stands between two marks, ``<!-- NAME -->`` and ``<!-- end NAME -->``; what one of
the commands below prints replaces what is between them, and a line says on what it was measured.
The text around is for people to write, and to correct after a look at the new figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
TABLES = {
    "loop": ["loop.py"],
    "rows": ["store.py", "rows"],
    "epochs": ["store.py", "epochs"],
    "views": ["store.py", "views"],
    "fast": ["fast_teacher.py"],
    "data": ["data.py"],
    "startup": ["startup.py"],
    "hints": ["hints.py"],
    "losses": ["losses.py"],
    "contrast": ["contrast.py"],
    "relations": ["relations.py"],
    "vocabulary": ["vocabulary.py"],
    "methods": ["methods.py"],
}
"""Name of a table -> the command that prints it."""


def machine() -> str:
    """Return in words what is measured on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = torch.get_num_threads()
        device = f"{cores} CPU cores ({torch.backends.cpu.get_cpu_capability()}), {threads} threads"
    return (
        f"{device}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    )


def written(page: str, name: str, table: str) -> str:
    """Return the page with another table between the marks of ``name``.

    Raises:
        ValueError: if the page has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{PAGE.name} has no marks {begin.strip()} and {end}")
    return f"{before}{begin}{table.strip()}\n{end}{after}"


def main() -> None:
    """Measure what is asked for, and write each table as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--arguments", default="", help="for the commands, e.g. '--turns 5'")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in TABLES]
    if unknown:
        parser.error(f"there is no table {unknown[0]}; there are {', '.join(TABLES)}")
    for name in given.names or TABLES:
        script, *arguments = TABLES[name]
        command = [sys.executable, str(HERE / script), *arguments, *given.arguments.split()]
        print(f"{name}: {script} {' '.join(arguments)}", flush=True)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        table = f"{done.stdout.strip()}\n\n({machine()})"
        PAGE.write_text(written(PAGE.read_text("utf-8"), name, table), "utf-8")


if __name__ == "__main__":
    main()
