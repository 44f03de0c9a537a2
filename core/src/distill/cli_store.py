"""Commands on stored outputs of teachers: ``store build``, ``ls``, ``verify`` and ``gc``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.cli_errors import Group
from distill.cli_options import plugin_option, remote_code_option, set_option, stores_option
from distill.errors import StorageError, UsageError

if TYPE_CHECKING:
    from distill.store.folder import Entry

DATA = 5
"""Exit code where data or stores are at fault."""


@click.group(cls=Group)
def store() -> None:
    """Store outputs of teachers ahead of a run, list them, look after them.

    A stage with `teacher: {model: ..., store: true}` fills its store as it trains.
    """


@store.command()
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@plugin_option
@remote_code_option
@click.option("--stage", help="Only the teachers of this stage.")
@stores_option
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Work on this machine with several processes (one a GPU, or CPUs).",
)
def build(
    file: Path,
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
    stage: str | None,
    stores: Path,
    processes: int | None,
) -> None:
    """Store what the teachers of an experiment give for all samples and views.

    What is there already stays; a build that was stopped goes on.
    """
    from distill.experiment_file import open_experiment

    experiment, registry = open_experiment(file, overrides, plugin_files)
    if processes is not None and "RANK" not in os.environ:
        from distill.launcher import launch, without_processes

        sys.exit(launch(processes, without_processes(sys.argv[1:])))
    from distill.store_building import build_stores

    build_stores(
        experiment,
        registry,
        stores,
        click.echo,
        stage=stage,
        allow_remote_code=allow_remote_code,
    )


@store.command()
@stores_option
def ls(stores: Path) -> None:
    """List stores, the one used last first.

    Teacher and data set stand with their names in the file that the store was made for, and their
    types. Asked is what is kept: the output, layers or parts. Views that are there for all samples
    count; filled is the share of rows that are there.
    """
    from distill.store.folder import entries

    found = entries(stores)
    if not found:
        click.echo(f"there are no stores in {stores}")
        return
    length = _shown(entry.name for entry in found)
    rows = [COLUMNS, *(_cells(entry, length) for entry in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, COLUMNS, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


COLUMNS = (
    *("store", "teacher", "asked", "data", "views", "rows", "filled", "kept as", "size"),
    "last used",
)
NUMBERS = ("views", "rows", "filled", "size")
UNKNOWN = "–"
WIDEST = 28
"""Characters of a cell at most."""
SHORTEST = 8
"""Characters of a store's name at least."""


def _shown(names: Iterable[str]) -> int:
    """Return how many characters of names tell all of them apart."""
    names = list(names)
    lengths = range(SHORTEST, max(map(len, names)) + 1)
    return next((n for n in lengths if len({name[:n] for name in names}) == len(names)), SHORTEST)


def _cells(entry: Entry, length: int) -> tuple[str, ...]:
    from distill.store.folder import size_text
    from distill.store.near import references

    name, size, used = entry.name[:length], size_text(entry.nbytes), _ago(int(entry.unused))
    if entry.meta is None:
        return (name, "damaged", *[""] * (len(COLUMNS) - 4), size, used)
    known, about = entry.meta["identity"], entry.meta.get("about", {})
    return (
        name,
        _named(about.get("teacher"), known["teacher"]["model"]["component"][0]),
        _listed(references(known["asked"])),
        _named(about.get("data"), known["data"]["component"][0]),
        f"{entry.views[0]} of {entry.views[1]}",
        f"{entry.meta['rows']:,}",
        f"{100 * entry.filled // max(entry.meta['rows'], 1)}%",
        _encoding(known["kept"]),
        size,
        used,
    )


def _encoding(kept: Mapping[str, Any]) -> str:
    name: str = kept["encoding"]
    return f"{name} ({kept['top']})" if name == "top_k" else name


def _ago(days: int) -> str:
    return "today" if days < 1 else f"{days:,} day{'' if days == 1 else 's'} ago"


def _named(name: str | None, kind: str) -> str:
    """Return what the file calls something, and its type."""
    return _short(f"{name or UNKNOWN} ({kind})")


def _listed(values: Sequence[str]) -> str:
    """Return as many values as there is room for, and how many more there are."""
    for count in range(len(values), 0, -1):
        more = f", +{len(values) - count}" if count < len(values) else ""
        text = ", ".join(values[:count]) + more
        if len(text) <= WIDEST:
            return text
    return _short(values[0])


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


@store.command()
@click.argument("names", metavar="[STORE]...", nargs=-1)
@stores_option
def verify(names: Sequence[str], stores: Path) -> None:
    """Look at every row of stores; damaged ones are computed anew when they are asked for.

    A store goes by its name or the beginning of it. Exits with 5 if there are damaged rows.
    """
    from distill.store.folder import entries
    from distill.store.folder import verify as verify_store

    there = {entry.name: entry.folder for entry in entries(stores)}
    chosen = [name for given in names for name in _chosen(given, list(there), stores)]
    if not there:
        click.echo(f"there are no stores in {stores}")
    is_damaged = False
    for name in chosen or there:
        try:
            filled, damaged = verify_store(there[name])
        except StorageError as error:
            click.echo(f"{name}: {error}")
            is_damaged = True
            continue
        state = f"{damaged:,} damaged, to be computed anew" if damaged else "all sound"
        click.echo(f"{name}: {filled:,} row{'' if filled == 1 else 's'}, {state}")
        is_damaged |= bool(damaged)
    if is_damaged:
        sys.exit(DATA)


def _chosen(given: str, there: Sequence[str], stores: Path) -> list[str]:
    """Return the one store whose name begins with what is given."""
    found = [given] if given in there else [name for name in there if name.startswith(given)]
    if len(found) == 1:
        return found
    known = ", ".join(found or there) or "none"
    what = f"{len(found)} stores begin with" if found else "there is no store"
    raise UsageError(f"{what} '{given}' in {stores} (there are: {known})")


@store.command()
@click.option(
    "--unused",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="DAYS",
    help="Remove stores that no run has opened for so many days.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and leave it there.")
@stores_option
def gc(unused: float, dry_run: bool, stores: Path) -> None:
    """Remove stores that are damaged beyond use, half made, or unused for long."""
    from distill.store.folder import garbage, remove, size_of, size_text

    if not stores.is_dir():
        click.echo(f"there are no stores in {stores}")
        return
    freed = 0
    for folder in garbage(stores, unused):
        nbytes = size_of(folder)
        if not dry_run:
            try:
                remove(folder)
            except OSError as error:
                raise StorageError(f"{folder} cannot be removed: {error.strerror}") from error
        freed += nbytes
        click.echo(f"{'would remove' if dry_run else 'removed'} {folder} ({size_text(nbytes)})")
    click.echo(f"{size_text(freed)} {'to be freed' if dry_run else 'freed'}")
