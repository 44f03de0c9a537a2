"""The stores in a folder: which there are, whether they are sound, and which nobody uses."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Literal

import numpy

from distill.errors import StorageError
from distill.store.measured import MEASURED
from distill.store.rows import CHECKS, META, ROWS, OtherVersion, Rows, open_rows, read_meta
from distill.store.use import is_held, kept_to_itself

BLOCK = 4096
"""So many rows are verified at a time."""
BEING_MADE = 3600
"""Seconds after which a store that is still being made belongs to a process that has died."""
DAY = 86_400
State = Literal["sound", "damaged", "half made", "of another version", "no store"]


@dataclass(frozen=True)
class Entry:
    """A store in a folder, or what lies there in place of one.

    Attributes:
        meta: what it says of itself; ``None`` unless it is sound.
        filled: rows that have been written.
        nbytes: what its rows and their checks take on disk.
        unused: days since it was last opened.
        views: how many of a sample's views are there for all samples, and how many there are.
        state: whether it can be used, or why not; ``half made`` is what a process left behind,
            ``no store`` a folder with something else in.
    """

    folder: Path
    meta: dict[str, Any] | None
    filled: int
    nbytes: int
    unused: float
    views: tuple[int, int] = (0, 1)
    state: State = "sound"

    @property
    def name(self) -> str:
        """Its name, by which commands know it."""
        return self.folder.name


def entries(stores: Path) -> list[Entry]:
    """Return the stores of a folder, the one used last first.

    Raises:
        StorageError: if there is no such folder, or it cannot be looked into.
    """
    if not stores.is_dir():
        raise StorageError(
            f"there is no folder {stores}; --stores DIR names the one that stores are in, and "
            "`distill store build FILE` makes it"
        )
    found = [folder for folder in _folders(stores) if not folder.name.startswith(".")]
    return sorted((_entry(folder) for folder in found), key=lambda entry: entry.unused)


def unwritable(stores: Path) -> str:
    """Return why no store can be made in a folder, and what to do; empty if one can.

    The folder need not be there, and nothing is left behind.
    """
    there = next(path for path in (stores.absolute(), *stores.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=there):
            return ""
    except OSError as error:
        why = error.strerror or str(error)
        return f"no store can be made in {stores} ({why}); --stores DIR names another folder"


def size_text(nbytes: int) -> str:
    """Return bytes as a person reads them: ``12.3 MB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes / 1000:,.1f} kB"


def _folders(stores: Path) -> list[Path]:
    try:
        return [path for path in stores.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError as error:
        raise StorageError(f"{stores} cannot be looked into: {error.strerror}") from error


def _entry(folder: Path) -> Entry:
    nbytes = size_of(folder)
    unused = _age(folder / META) / DAY
    try:
        meta = read_meta(folder)
        rows = open_rows(folder, touch=False)
    except StorageError as error:
        state: State = "of another version" if isinstance(error, OtherVersion) else "damaged"
        state = state if _is_store(folder) else "no store"
        return Entry(folder, None, 0, nbytes, unused, state=state)
    each = meta.get("identity", {}).get("views") or 1
    complete = int((rows.checks["check"].reshape(-1, each) != 0).all(0).sum())
    return Entry(folder, meta, rows.filled, nbytes, unused, (complete, each))


def _age(path: Path) -> float:
    """Return the seconds since a file, or the folder around it, was changed."""
    there = path if path.exists() else path.parent
    return max(time() - there.stat().st_mtime, 0.0)


def verify(store: Path) -> tuple[int, int]:
    """Look at every row of a store; damaged ones count as absent from now on.

    Returns:
        How many rows there are, and how many of them were damaged.

    Raises:
        StorageError: if it is damaged beyond use.
    """
    rows: Rows = open_rows(store, touch=False)
    filled, damaged = rows.filled, 0
    for first in range(0, len(rows), BLOCK):
        wrong = rows.damaged(numpy.arange(first, min(first + BLOCK, len(rows))))
        if len(wrong):
            rows.forget(wrong)
            damaged += len(wrong)
    return filled, damaged


def garbage(stores: Path, unused_days: float) -> list[Entry]:
    """Return what of a folder can go: stores that nobody has used for long, or can use.

    Of others' folders nothing is returned: only what looks like a store, or like one being made.
    A store of another version of distill, which may be of use to that one, goes by its age alone.

    Raises:
        StorageError: if there is no such folder, or it cannot be looked into.
    """
    found = [
        entry
        for entry in entries(stores)
        if _is_store(entry.folder) and (entry.state == "damaged" or entry.unused > unused_days)
    ]
    hidden = [path for path in _folders(stores) if path.name.startswith(".") and _is_store(path)]
    ages = [(path, _age(path / META)) for path in hidden]
    return found + [
        Entry(path, None, 0, size_of(path), age / DAY, state="half made")
        for path, age in ages
        if age > BEING_MADE
    ]


def _is_store(folder: Path) -> bool:
    """Whether a folder holds nothing but what a store does."""
    known = {ROWS, CHECKS, META, MEASURED}
    names = {file.name for file in _files(folder) if not file.name.startswith(".measured")}
    return bool(names) and names <= known


def size_of(store: Path) -> int:
    """Return how many bytes a store's rows and their checks take; all else are a few kB."""
    kept = [file for file in _files(store) if file.name in (ROWS, CHECKS) and file.is_file()]
    return sum(file.stat().st_size for file in kept)


def _files(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder; nothing if it may not be looked into."""
    with suppress(OSError):
        yield from folder.iterdir()


def is_used(store: Path) -> bool:
    """Whether a run or a build, in whatever process, has a store open."""
    return is_held(store / META)


def remove(store: Path) -> int:
    """Remove a store and return how many bytes its rows and their checks had.

    Raises:
        StorageError: if it is in use, holds what is none of a store's, or cannot be removed.
    """
    if not _is_store(store):
        raise StorageError(f"{store} holds more than a store, or none; remove it by other means")
    nbytes = size_of(store)
    going = store.with_name(f".{store.name.lstrip('.')}.removed")
    shutil.rmtree(going, ignore_errors=True)  # of a process that was killed while it removed
    try:
        with kept_to_itself(store / META) as is_free:
            if not is_free:
                raise StorageError(f"{store} is in use by a run or a build; end that first")
            # Out of sight at once: nobody opens a store half of which is gone.
            store.rename(going)
        shutil.rmtree(going)
    except OSError as error:
        why = error.strerror or error
        raise StorageError(f"{store} cannot be removed: {why}") from error
    return nbytes
