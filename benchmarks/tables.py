"""Measures everything and writes the tables into docs/performance.md.

Each table there stands between two marks, ``<!-- NAME -->`` and ``<!-- end NAME -->``; what one of
the commands below prints replaces what is between them, and a line says on what it was measured.
``--arguments`` go behind those that stand here, so that ``--arguments '--turns 3'`` is for a look.
The text around is for people to write, and to correct after a look at the new figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


@dataclass(frozen=True)
class Table:
    """What prints a table.

    Attributes:
        command: a script and its arguments.
        threads: of torch; as many as there are cores where it is ``None``.
        bare: of what the command prints, only the table is for the page.
        left_out: columns that are not.
    """

    command: Sequence[str]
    threads: int | None = None
    bare: bool = False
    left_out: Sequence[str] = ()


RELATIONS = ["--only", "torchdistill", "--pages", "kept", "--turns", "15"]
TABLES = {
    "loop": Table(["loop.py"]),
    "rows": Table(["store_rows.py"]),
    "store-steps": Table(["store.py", "steps"]),
    "epochs": Table(["store.py", "epochs"]),
    "views": Table(["store.py", "views", "--turns", "9"]),
    "fast": Table(["fast_teacher.py"]),
    "data": Table(["data.py"]),
    "startup": Table(["startup.py"]),
    "hints": Table(["hints.py", "--turns", "11"], threads=1),
    "losses": Table(["losses.py", "--turns", "5"], threads=1),
    "contrast": Table(["contrast.py", "--only", "losses", "--turns", "9"]),
    "banks": Table(["contrast.py", "--only", "sizes"]),
    "crd-steps": Table(["contrast_steps.py"]),
    "relations": Table(["relations.py", *RELATIONS], threads=1),
    "relation-steps": Table(["relations.py", "--only", "steps", "--turns", "5"], threads=1),
    "sskd-step": Table(["relations.py", "--only", "sskd", "--turns", "25"]),
    "vocabulary": Table(
        ["vocabulary.py"], threads=1, bare=True, left_out=["beyond, of one side's logits"]
    ),
    "methods": Table(["methods.py"], bare=True, left_out=["peak memory"]),
}


def machine(threads: int | None = None) -> str:
    """Return in words what is measured on.

    Args:
        threads: of torch; as many as it takes by itself where it is ``None``.
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind, number = torch.backends.cpu.get_cpu_capability(), threads or torch.get_num_threads()
        device = f"{cores} CPU cores ({kind}), {number} thread{'s' * (number > 1)}"
    return (
        f"{device}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    )


def printed(table: Table, arguments: Sequence[str]) -> str:
    """Run a table's command with more arguments; return what of it is for the page."""
    script, *own = table.command
    threads = {} if table.threads is None else {"OMP_NUM_THREADS": str(table.threads)}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *own, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    )
    print(done.stdout, flush=True)
    return for_page(done.stdout, table)


def for_page(text: str, table: Table) -> str:
    """Return what a command has printed without what the page leaves out."""
    if table.bare:
        text = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    if not table.left_out:
        return text
    rows = [line.split("|") for line in text.splitlines()]
    dropped = {at for at, cell in enumerate(rows[0]) if cell.strip() in table.left_out}
    return "\n".join(
        "|".join(cell for at, cell in enumerate(row) if at not in dropped) for row in rows
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
    names = given.names or list(TABLES)
    for name in names:
        written(PAGE.read_text("utf-8"), name, "")  # or it would fail behind what takes long
    for name in names:
        table, arguments = TABLES[name], given.arguments.split()
        print(f"{name}: {' '.join([*table.command, *arguments])}", flush=True)
        text = f"{printed(table, arguments).strip()}\n\n({machine(table.threads)})"
        PAGE.write_text(written(PAGE.read_text("utf-8"), name, text), "utf-8")


if __name__ == "__main__":
    main()
