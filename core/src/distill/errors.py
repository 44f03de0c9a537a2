"""The errors users see: what was asked, where, what was offered, what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class DistillError(Exception):
    """An error with a message for the user.

    Attributes:
        exit_code: what the command ends with.
        of_one_process: whether other processes may not have found it, since it came from its data.
    """

    exit_code = 70
    of_one_process = False


class UsageError(DistillError):
    """A command was asked for something that is not there."""

    exit_code = 2


class PluginError(DistillError):
    """A plugin is missing, broken, or offers a name that another one offers too."""

    exit_code = 3


class NumericalError(DistillError):
    """Training left the finite numbers, or a term cannot train anything."""

    exit_code = 4


class DataError(DistillError):
    """A data set cannot be read, is empty, or does not fit the model."""

    exit_code = 5


class StorageError(DistillError):
    """A checkpoint or result cannot be read or written."""

    exit_code = 6


@dataclass(frozen=True)
class Location:
    """A place in a file; ``line`` and ``column`` count from 1, 0 means unknown."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with an experiment file."""

    message: str
    path: str
    location: Location

    def __str__(self) -> str:
        return f"{self.location}: {self.path + ': ' if self.path else ''}{self.message}"


class ConfigError(DistillError):
    """All faults of an experiment file at once, in the order of its lines."""

    exit_code = 2

    def __init__(self, faults: Iterable[Fault]):
        self.faults: Sequence[Fault] = sorted(
            set(faults), key=lambda f: (f.location.file, f.location.line, f.location.column, f.path)
        )
        super().__init__("\n".join(map(str, self.faults)))


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``"; did you mean a or b?"`` with the names nearest to ``name``, or an empty text."""
    names = list(known)
    lowered = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if name.lower() in lowered and lowered[name.lower()] not in near:
        near.insert(0, lowered[name.lower()])
    if not near:
        in_other_case = difflib.get_close_matches(name.lower(), lowered, n=limit, cutoff=0.6)
        near = [lowered[each] for each in in_other_case]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def as_yaml(value: object) -> str:
    """Return a value as an experiment file may have it, in a message: ``false``, not ``False``."""
    if isinstance(value, str) and not _is_json(value):
        return value
    return json.dumps(value, default=str)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
