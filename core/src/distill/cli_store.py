"""Commands on stored outputs of teachers: ``store build``, ``ls``, ``verify``, ``remove``, ``gc``.

Like ``distill --help``, they import what takes long where it is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from distill.cli_errors import RESUMABLE, Group, told_if_ended
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
    """Store what teachers give, ahead of a run: all samples and views.

    What is there already stays; a build that was stopped goes on.
    """
    with _going_on():
        if "RANK" not in os.environ:
            _announce(file, overrides, stage, stores)
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


@contextmanager
def _going_on() -> Iterator[None]:
    """Say, if what is done meanwhile is stopped, that it need not be begun anew."""
    goes_on = "what is stored stays, and the same command goes on"
    try:
        with told_if_ended(goes_on):
            yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            click.echo(f"\nstopped; {goes_on}", err=True)
        sys.exit(RESUMABLE)


def _announce(file: Path, overrides: Sequence[str], only: str | None, stores: Path) -> None:
    """Say what is going to be stored: to load what it takes can be a matter of a minute."""
    from distill.config.load import draft
    from distill.config.overrides import override_experiment
    from distill.config.yaml_document import read

    experiment, faults = draft(override_experiment(read(file), overrides))
    if experiment is None or faults:
        return  # to be told with the faults of the components
    for stage in experiment.stages:
        if only not in (None, stage.name):
            continue
        for role, teacher in stage.teachers.items():
            if teacher.store is not None:
                views = stage.data.views
                each = f", {views} view{'s' * (views > 1)} of each sample" if views else ""
                click.echo(
                    f"stage {stage.name}: {role} ({teacher.model}) on {stage.data.train}{each} -> "
                    f"{stores}; loading"
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

    source = click.get_current_context().get_parameter_source("stores")
    if source is ParameterSource.DEFAULT and not stores.exists():
        click.echo(
            f"no stores in {stores}/; a stage with teacher: {{model: ..., store: true}} makes one"
        )
        return
    found = entries(stores)
    others = [entry.name for entry in found if entry.state == "no store"]
    found = [entry for entry in found if entry.state != "no store"]
    if not found:
        click.echo(f"no stores in {stores}")
        _tell_others(others)
        return
    length = _shown(entry.name for entry in found)
    _table([_cells(entry, length) for entry in found])
    _tell_others(others)


def _table(stores: Sequence[tuple[str, ...]]) -> None:
    """Print stores, a line each."""
    rows = [COLUMNS, *stores]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if heading in NUMBERS else cell.ljust(width)
            for cell, width, heading in zip(row, widths, COLUMNS, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _tell_others(names: Sequence[str]) -> None:
    """Tell of folders that lie among stores."""
    if names:
        click.echo(
            f"no {'stores' if names[1:] else 'store'}: {_listed(sorted(names), WIDEST_LINE)}"
        )


COLUMNS = (
    *("store", "teacher", "asked", "data", "views", "rows", "filled", "kept as", "size"),
    "last used",
)
NUMBERS = ("views", "rows", "filled", "size")
UNKNOWN = "–"
WIDEST = 28
"""Characters of a cell at most."""
WIDEST_LINE = 80
"""Characters of a list of names at most."""
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
    if entry.meta is None or not {"teacher", "asked", "data", "kept"} <= {*_identity(entry)}:
        state = "of another version" if entry.state == "sound" else entry.state
        return (name, state, *[""] * (len(COLUMNS) - 4), size, used)
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


def _identity(entry: Entry) -> Mapping[str, Any]:
    """Return what a store was made for; nothing if it does not say so."""
    found: Mapping[str, Any] = (entry.meta or {}).get("identity", {})
    return found


def _encoding(kept: Mapping[str, Any]) -> str:
    name: str = kept["encoding"]
    return f"{name} ({kept['top']})" if name == "top_k" else name


def _ago(days: int) -> str:
    return "today" if days < 1 else f"{days:,} day{'' if days == 1 else 's'} ago"


def _named(name: str | None, kind: str) -> str:
    """Return what the file calls something, and its type."""
    return _short(f"{name or UNKNOWN} ({kind})")


def _listed(values: Sequence[str], widest: int = WIDEST) -> str:
    """Return as many values as there is room for, and how many more there are."""
    for count in range(len(values), 0, -1):
        more = f", +{len(values) - count}" if count < len(values) else ""
        text = ", ".join(values[:count]) + more
        if len(text) <= widest:
            return text
    return _short(values[0])


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


@store.command()
@click.argument("names", metavar="[STORE]...", nargs=-1)
@stores_option
def verify(names: Sequence[str], stores: Path) -> None:
    """Look at every row of stores, and at how good teachers were found to be, for damage.

    STORE is a name as `distill store ls` prints it, or the beginning of one; without any, all are
    looked at. Damaged rows are computed anew when they are asked for, and so is how good a teacher
    is. Exits with 5 if anything is damaged, or stores cannot be used.
    """
    from distill.store.folder import entries
    from distill.store.folder import verify as verify_store
    from distill.store.measured import MEASURED, forget_damaged

    found = entries(stores)
    there = [entry for entry in found if entry.state != "no store"]
    chosen = _chosen(names, there, stores) if names else there
    if not chosen:
        click.echo(f"no stores in {stores}")
    is_damaged = False
    for entry in chosen:
        try:
            filled, damaged = verify_store(entry.folder)
        except StorageError as error:
            click.echo(f"{error}; {_way_out(entry)}")
            is_damaged = True
            continue
        state = f"{damaged:,} damaged, to be computed anew" if damaged else "all sound"
        is_unmeasured = forget_damaged(entry.folder)
        if is_unmeasured:
            state += f"; {MEASURED} is damaged, and the teacher is to be measured anew"
        click.echo(f"{entry.name}: {filled:,} row{'' if filled == 1 else 's'}, {state}")
        is_damaged |= bool(damaged) or is_unmeasured
    if not names:
        _tell_others([entry.name for entry in found if entry.state == "no store"])
    if is_damaged:
        sys.exit(DATA)


def _way_out(entry: Entry) -> str:
    """Return what becomes of a store that cannot be used."""
    if entry.state == "damaged":
        return "a run that asks for it begins it anew, `distill store gc` removes it"
    return f"`distill store remove {entry.name}` removes it"


def _chosen(names: Iterable[str], there: Sequence[Entry], stores: Path) -> list[Entry]:
    """Return the stores whose names begin with what is given, each of them once.

    Raises:
        UsageError: if there is no such store, or more than one; it names those that there are.
    """
    chosen = [_named_entry(name, there, stores) for name in names]
    return list({entry.name: entry for entry in chosen}.values())


def _named_entry(given: str, there: Sequence[Entry], stores: Path) -> Entry:
    given = given.rstrip("/").removeprefix(f"{stores}/")  # as `store build` prints it
    found = [entry for entry in there if entry.name == given]
    found = found or [entry for entry in there if given and entry.name.startswith(given)]
    if len(found) == 1:
        return found[0]
    length = _shown(entry.name for entry in there) if there else 0
    known = ", ".join(entry.name[:length] for entry in found or there) or "none"
    what = f"{len(found)} stores begin with" if found else "there is no store"
    raise UsageError(f"{what} '{given}' in {stores} (there are: {known})")


@store.command()
@click.argument("names", metavar="STORE...", nargs=-1, required=True)
@click.option("--yes", "-y", is_flag=True, help="Remove them without asking.")
@stores_option
def remove(names: Sequence[str], yes: bool, stores: Path) -> None:
    """Remove stores by name, after a look at what they are.

    STORE is a name as `distill store ls` prints it, or the beginning of one. What a run or a build
    has open is not removed.
    """
    from distill.store.folder import entries, is_used, size_text
    from distill.store.folder import remove as remove_store

    there = [entry for entry in entries(stores) if entry.state != "no store"]
    chosen = _chosen(names, there, stores)
    used = [str(entry.folder) for entry in chosen if is_used(entry.folder)]
    if used:
        is_or_are = "are" if used[1:] else "is"
        raise StorageError(
            f"{', '.join(used)} {is_or_are} in use by a run or a build; end that first "
            "(nothing has been removed)"
        )
    if not (yes or _may_go(chosen, there, stores)):
        return
    for entry in chosen:
        click.echo(f"removed {entry.folder} ({size_text(remove_store(entry.folder))})")


def _may_go(chosen: Sequence[Entry], there: Iterable[Entry], stores: Path) -> bool:
    """Show stores and ask whether they are to be removed, and say so if they are not.

    Args:
        chosen: the stores.
        there: stores that the names shown tell them apart from.
        stores: the folder that they are in.
    """
    from distill.store.folder import size_text

    length = _shown(entry.name for entry in there)
    _table([_cells(entry, length) for entry in chosen])
    which = "these stores" if chosen[1:] else "this store"
    size = size_text(sum(entry.nbytes for entry in chosen))
    is_wanted = _is_wanted(f"remove {which} from {stores} ({size})?")
    if not is_wanted:
        click.echo("nothing is removed")
    return is_wanted


def _is_wanted(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:
        click.echo()
        raise UsageError("nobody answered, so nothing is removed; --yes asks nothing") from None


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
@click.option("--yes", "-y", is_flag=True, help="Remove them without asking.")
@stores_option
def gc(unused: float, dry_run: bool, yes: bool, stores: Path) -> None:
    """Remove stores that are damaged, left half made or unused for long.

    Damaged is what no run can use, half made what a process left that died while it made the files;
    rows that are still to be filled are neither. Of single damaged rows see `distill store
    verify`. What a run or a build has open stays. Before stores go that were used within the last
    day, as with `--unused 0`, it asks.
    """
    from distill.store.folder import garbage, is_used, remove, size_text

    found = garbage(stores, unused)
    if not found:
        days = f"{unused:g} day{'' if unused == 1 else 's'}"
        click.echo(f"nothing to remove in {stores} (none damaged, half made or unused for {days})")
        return
    recent = [entry for entry in found if _is_recent(entry) and not is_used(entry.folder)]
    if recent and not (yes or dry_run or _may_go(recent, recent, stores)):
        return
    freed = 0
    for entry in found:
        if is_used(entry.folder):  # it may be only now
            click.echo(f"{entry.folder} is in use, and stays")
            continue
        nbytes = entry.nbytes if dry_run else remove(entry.folder)
        freed += nbytes
        verb = "would remove" if dry_run else "removed"
        click.echo(f"{verb} {entry.folder} ({size_text(nbytes)})")
    click.echo(f"{size_text(freed)} {'to be freed' if dry_run else 'freed'}")


def _is_recent(entry: Entry) -> bool:
    """Whether a store can be used, and was within the last day."""
    return entry.state in ("sound", "of another version") and entry.unused < 1
