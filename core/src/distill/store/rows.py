"""Rows of fixed width on disk, each with a check of its own: read without locks, never wrong.

A folder holds three files. ``meta.json`` says what the rows are. ``rows.bin`` has them one behind
the other. ``checks.bin`` has for each row the fingerprint of the input that it was computed from,
and a check over row and fingerprint; zeros say that there is none. Whatever happens to a row, by
two writers at once, a crash, a flipped bit or a file cut short, its check does not fit any more,
and it counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy
import xxhash
from numpy.typing import NDArray

from distill.errors import StorageError
from distill.store.use import hold, let_go

FORMAT = 1
CHECK = numpy.dtype([("fingerprint", "<u8"), ("check", "<u4")])
"""Twelve bytes a row."""
META, ROWS, CHECKS = "meta.json", "rows.bin", "checks.bin"
DIGEST = "sha256"
"""What ``meta.json`` calls the hash over all else in it, and ``measured.json`` too."""
Bytes = NDArray[numpy.uint8]


class OtherVersion(StorageError):
    """A store is laid out as another version of distill does."""


@dataclass(frozen=True)
class Rows:
    """An open store.

    Attributes:
        folder: that its files are in.
        meta: what ``meta.json`` says.
        rows: uint8 (rows, width), mapped from the disk.
        checks: (rows,), likewise.
        held: open for as long as the store is in use by this process, if it is.
    """

    folder: Path
    meta: Mapping[str, Any]
    rows: Bytes
    checks: NDArray[Any]
    held: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self.checks)

    @property
    def filled(self) -> int:
        """How many rows have been written, right or wrong."""
        return int(numpy.count_nonzero(self.checks["check"]))

    @property
    def may_be_written(self) -> bool:
        """Whether rows can be added; those of others may have to be left as they are."""
        return bool(self.rows.flags.writeable)

    def read(self, at: NDArray[numpy.int64], fingerprints: NDArray[numpy.uint64]) -> Found:
        """Read rows that were computed from the very same inputs.

        Args:
            at: numbers of rows (B,).
            fingerprints: of the inputs (B,).
        """
        rows, checks = self.rows[at], self.checks[at]
        valid = checks["fingerprint"] == fingerprints
        for number in numpy.flatnonzero(valid):
            if _check(rows[number], int(fingerprints[number])) != checks["check"][number]:
                valid[number] = False
        damaged = (checks["check"] != 0) & ~valid
        return Found(rows, valid, int(damaged.sum()))

    def write(
        self, at: NDArray[numpy.int64], rows: Bytes, fingerprints: NDArray[numpy.uint64]
    ) -> None:
        """Write rows in place, unless the store may only be read.

        A row counts once its check is written, which comes last.
        """
        if not self.may_be_written:
            return
        checks = numpy.empty(len(at), CHECK)
        checks["fingerprint"] = fingerprints
        pairs = zip(rows, fingerprints.tolist(), strict=True)
        checks["check"] = [_check(row, fingerprint) for row, fingerprint in pairs]
        self.rows[at] = rows
        self.checks[at] = checks

    def release(self) -> None:
        """Say that this process does not use the store any more, so that it may be removed."""
        if self.held is not None:
            let_go(self.held)

    def damaged(self, at: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
        """Return which of some rows have been written and are not what was written."""
        rows, checks = self.rows[at], self.checks[at]
        written = numpy.flatnonzero(checks["check"])
        wrong = [
            number
            for number in written
            if _check(rows[number], int(checks["fingerprint"][number])) != checks["check"][number]
        ]
        return at[wrong]

    def forget(self, at: NDArray[numpy.int64]) -> None:
        """Let rows count as absent, unless the store may only be read."""
        if self.may_be_written:
            self.checks[at] = numpy.zeros((), CHECK)


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        rows: uint8 (B, width); those that are not valid hold anything.
        valid: bool (B,).
        refused: how many there are that are damaged or of another input.
    """

    rows: Bytes
    valid: NDArray[numpy.bool_]
    refused: int


def _check(row: Bytes, fingerprint: int) -> int:
    return (xxhash.xxh3_64_intdigest(row.data, fingerprint) & 0xFFFFFFFF) or 1


def create(folder: Path, meta: Mapping[str, Any], rows: int, width: int) -> None:
    """Make an empty store, unless there is one; its place on disk is taken at once.

    Raises:
        StorageError: if there is no room for it, or it cannot be written.
    """
    if is_sound(folder):
        return
    needed = rows * (width + CHECK.itemsize)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise StorageError(
                f"a store of {rows:,} rows of {width:,} bytes takes {needed / 1e9:,.1f} GB in "
                f"{folder.parent}, where {free / 1e9:,.1f} GB are free; encoding: top_k or int8 "
                "takes less, and --stores names another folder"
            )
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _take_place(new / ROWS, rows * width)
            _take_place(new / CHECKS, rows * CHECK.itemsize)
            full = {"format": FORMAT, **meta, "rows": rows, "width": width}
            full = json.loads(json.dumps(full, default=str))
            (new / META).write_text(json.dumps({**full, DIGEST: digest_of(full)}, indent=1))
            new.chmod(0o755)
            if folder.exists():  # damaged beyond use; `distill store gc` removes it
                folder.rename(new.with_name(f"{new.name}.damaged"))
            new.rename(folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if not is_sound(folder):  # else another process was first
                raise
    except OSError as error:
        why = error.strerror or error
        text = f"the store {folder} cannot be made ({why}); --stores DIR names another folder"
        raise StorageError(text) from error


def _take_place(file: Path, size: int) -> None:
    """Make a file of zeros and take its room: a full disk would kill a process that maps it."""
    with file.open("wb") as opened:
        _reserve(opened, size)


def _reserve(file: IO[bytes], size: int) -> None:
    file.truncate(size)
    if size and hasattr(os, "posix_fallocate"):  # not everywhere
        os.posix_fallocate(file.fileno(), 0, size)


def open_rows(folder: Path, *, touch: bool = True) -> Rows:
    """Open a store; files that have been cut short get their length back, filled with zeros.

    Args:
        folder: of the store.
        touch: whether that counts as using it, and keeps others from removing it.

    Raises:
        StorageError: if it is no store, or one of another version.
    """
    meta = read_meta(folder)
    held = hold(folder / META) if touch else None
    try:
        rows = _mapped(folder / ROWS, numpy.dtype(numpy.uint8), (meta["rows"], meta["width"]))
        checks = _mapped(folder / CHECKS, CHECK, (meta["rows"],))
        if touch:
            with suppress(OSError):
                os.utime(folder / META)
    except OSError as error:
        why = error.strerror or error
        raise StorageError(f"the store {folder} cannot be opened: {why}") from error
    return Rows(folder, meta, rows, checks, held)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what a store says of itself.

    Raises:
        OtherVersion: if it is one of another version.
        StorageError: if it is no store, or a damaged one.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text())
        version, digest = meta["format"], meta.pop(DIGEST, None)
    except FileNotFoundError as error:
        raise StorageError(f"{folder} is no store, or a damaged one: it has no {META}") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"its {META} cannot be read"
        raise StorageError(f"{folder} is no store, or a damaged one: {why}") from error
    if version != FORMAT:
        raise OtherVersion(
            f"{folder} was written by another version of distill, whose stores have layout "
            f"{version} where this one's have {FORMAT}"
        )
    if digest != digest_of(meta):
        raise StorageError(f"{folder} is damaged: its {META} is not what was written")
    return meta


def is_sound(folder: Path) -> bool:
    """Whether a folder holds a store that can be opened."""
    try:
        read_meta(folder)
    except StorageError:
        return False
    return True


def digest_of(meta: Mapping[str, Any]) -> str:
    """Return the hash that is written under ``DIGEST`` beside all else in a JSON file."""
    text = json.dumps(meta, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _mapped(file: Path, dtype: numpy.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    size = dtype.itemsize * int(numpy.prod(shape))
    if not file.exists() or file.stat().st_size != size:
        with file.open("ab") as opened:
            _reserve(opened, size)
    if size == 0:
        return numpy.zeros(shape, dtype)
    may_write = os.access(file, os.W_OK)  # else a store of others, which can be read all the same
    mapped = numpy.memmap(file, dtype, "r+" if may_write else "r", shape=shape)
    return mapped.view(numpy.ndarray)
