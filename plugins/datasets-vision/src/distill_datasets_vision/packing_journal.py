"""What packing has written so far, line by line, so that the same packing can go on from there.

Each line is the hash of a text and the text, JSON: first what is packed and how, then one line for
each sample in its order.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

IMAGES, JOURNAL = "images.bin", "packing.jsonl"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """An image as it is packed: height, width and channels, and a target of numbers if any."""

    data: bytes
    shape: tuple[int, int, int]
    target: np.ndarray | None


@dataclass(frozen=True)
class Bad:
    """In place of a sample that cannot be packed, though others may."""

    why: str


@dataclass
class Images:
    """What is known of the images in the file, one behind the other, and of those left out."""

    offsets: list[int] = field(default_factory=lambda: [0])
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    targets: list[np.ndarray | None] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """How many samples have been gone through."""
        return len(self.shapes) + len(self.bad)

    def add(self, record: Record) -> None:
        if "bad" in record:
            self.bad[self.samples] = record["bad"]
            return
        self.offsets.append(self.offsets[-1] + record["bytes"])
        self.shapes.append(record["shape"])
        self.checks.append(record["check"])
        self.targets.append(_array(record["target"]))


def record_of(entry: Entry | Bad) -> Record:
    """Return what a line of the journal says of a sample."""
    if isinstance(entry, Bad):
        return {"bad": entry.why}
    target = entry.target
    return {
        "bytes": len(entry.data),
        "shape": entry.shape,
        "check": xxhash.xxh3_64_intdigest(entry.data),
        "target": None if target is None else _text_of(target),
    }


def _text_of(array: np.ndarray) -> list[Any]:
    """Return an array as JSON takes it; as numbers a mask would be larger than its image."""
    return [array.dtype.str, array.shape, base64.b64encode(array.tobytes()).decode()]


def _array(text: Sequence[Any] | None) -> np.ndarray | None:
    if text is None:
        return None
    kind, shape, data = text
    array: np.ndarray = np.frombuffer(base64.b64decode(data), kind).reshape(shape)
    return array


def line_of(record: Record) -> bytes:
    """Return a line of the journal."""
    text = json.dumps(record).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def take_up(folder: Path, head: Record, again: Callable[[int], Record]) -> Images:
    """Return what packing with the same head has written to a folder, and cut its files behind it.

    An image counts if the file has its bytes. Samples that were bad have to be so once more, and
    all that follows one that is not is packed again.

    Args:
        folder: of the two files, which are made where they are missing.
        head: what is packed and how.
        again: packs a sample once more.

    Raises:
        FileExistsError: if there are images of another packing: with another head, or whose first
            image is not what the first is packed to now.
    """
    (folder / JOURNAL).touch()
    (folder / IMAGES).touch()
    images, first = Images(), line_of(head)
    length = len(first)
    with (folder / JOURNAL).open("rb") as lines, (folder / IMAGES).open("rb") as stream:
        is_same = lines.readline() == first
        for line in lines:
            record = _record_in(line)
            if record is None or not _is_there(record, stream):
                break
            if not is_same:
                raise _other_packing(folder)
            if "bad" in record:
                if "bad" not in again(images.samples):  # why may name an address in memory
                    break
            elif not images.shapes and line_of(again(images.samples)) != line:
                raise _other_packing(folder)
            images.add(record)
            length += len(line)
    os.truncate(folder / IMAGES, images.offsets[-1])
    if images.samples:
        os.truncate(folder / JOURNAL, length)
    else:
        (folder / JOURNAL).write_bytes(first)
    return images


def _other_packing(folder: Path) -> FileExistsError:
    return FileExistsError(
        f"{folder} is half-packed with images of other files, labels, settings or code; empty it "
        "to begin anew, or choose another folder"
    )


def _record_in(line: bytes) -> Record | None:
    """Return what a line says, or nothing if it was not written to its end."""
    check, _, text = line.partition(b" ")
    if xxhash.xxh3_64_hexdigest(text[:-1]).encode() != check or not text.endswith(b"\n"):
        return None
    record: Record = json.loads(text)
    return record


def _is_there(record: Record, stream: BinaryIO) -> bool:
    if "bad" in record:
        return True
    check: int = record["check"]
    return xxhash.xxh3_64_intdigest(stream.read(record["bytes"])) == check
