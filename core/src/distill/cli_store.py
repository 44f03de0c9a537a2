"""Commands on stored outputs of teachers: ``store build``, ``ls``, ``verify`` and ``gc``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from distill.cli_errors import Group
from distill.cli_options import plugin_option, remote_code_option, set_option, stores_option
from distill.errors import StorageError, UsageError

DATA = 5
"""Exit code where data or stores are at fault."""


@click.group(cls=Group)
def store() -> None:
    """Store outputs of teachers ahead of a run, list them, look after them.

    A stage with `teacher: {model: ..., store: true}` fills its store in its first epoch by itself.
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
    """List stores: whose outputs, of which data, how many rows are there, when they were used."""
    from distill.store.folder import entries

    found = entries(stores)
    if not found:
        click.echo(f"there are no stores in {stores}")
        return
    rows = [("store", "teacher", "data", "views", "kept", "rows", "MB", "last used")]
    for entry in found:
        size = f"{entry.nbytes / 1e6:,.1f}"
        used = f"{entry.unused:.0f} days ago" if entry.unused >= 1 else "today"
        if entry.meta is None:
            rows.append((entry.name, "damaged", "", "", "", "", size, used))
            continue
        known = entry.meta["identity"]
        share = entry.filled / max(entry.meta["rows"], 1)
        rows.append(
            (
                entry.name,
                known["teacher"]["model"]["component"][0],
                known["data"]["component"][0],
                str(known["views"] or 1),
                known["kept"]["encoding"],
                f"{entry.filled:,} of {entry.meta['rows']:,} ({share:.0%})",
                size,
                used,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@store.command()
@click.argument("names", metavar="[STORE]...", nargs=-1)
@stores_option
def verify(names: Sequence[str], stores: Path) -> None:
    """Look at every row of stores; damaged ones are computed anew when they are asked for.

    Exits with 5 if there are any.
    """
    from distill.store.folder import entries
    from distill.store.folder import verify as verify_store

    there = {entry.name: entry.folder for entry in entries(stores)}
    unknown = [name for name in names if name not in there]
    if unknown:
        known = ", ".join(there) or "none"
        raise UsageError(f"there is no store '{unknown[0]}' in {stores} (there are: {known})")
    if not there:
        click.echo(f"there are no stores in {stores}")
    is_damaged = False
    for name in names or there:
        try:
            filled, damaged = verify_store(there[name])
        except StorageError as error:
            click.echo(f"{name}: {error}")
            is_damaged = True
            continue
        state = f"{damaged:,} damaged, to be computed anew" if damaged else "all sound"
        click.echo(f"{name}: {filled:,} rows, {state}")
        is_damaged |= bool(damaged)
    if is_damaged:
        sys.exit(DATA)


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
    from distill.store.folder import garbage, remove

    freed = 0
    if not stores.is_dir():
        click.echo(f"there are no stores in {stores}")
    for folder in garbage(stores, unused):
        if dry_run:
            click.echo(f"would remove {folder}")
        else:
            freed += remove(folder)
            click.echo(f"removed {folder}")
    if not dry_run:
        click.echo(f"{freed / 1e6:,.1f} MB freed")
