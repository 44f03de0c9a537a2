"""An experiment file as plain data that knows where each value stands."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from distill.config.yaml_nodes import MAX_BYTES, MAX_DEPTH, TOO_LARGE, Scalar, compose, refuse
from distill.config.yaml_values import Path, Values
from distill.errors import ConfigError, Fault, Location, did_you_mean

__all__ = ["Document", "Path", "override", "parse", "path_text", "read"]


@dataclass(frozen=True)
class Document:
    """The data of one file.

    Attributes:
        file: the file as the user named it.
        data: mappings, lists, text, numbers, booleans and None; no two places share an object.
        locations: for an entry of a mapping where its key stands, for an item of a list where
            the item stands; ``()`` is the whole.
        text: what was read.
        overrides: assignments that ``data`` has taken since.
    """

    file: str
    data: dict[str, Any]
    locations: Mapping[Path, Location]
    text: str = ""
    overrides: tuple[str, ...] = ()

    def locate(self, path: Path) -> Location:
        """Return where ``path`` stands, or the nearest place around it that is in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.locations:
                return self.locations[path[:end]]
        return Location(self.file)


def read(file: str | os.PathLike[str]) -> Document:
    """Read an experiment file.

    Raises:
        ConfigError: if the file cannot be read, and as :func:`parse` does.
    """
    name = os.fspath(file)
    try:
        with open(name, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            refuse(TOO_LARGE, Location(name))
        text = raw.decode("utf-8")
    except FileNotFoundError:
        refuse(f"there is no such file{_similar_files(name)}", Location(name))
    except IsADirectoryError:
        refuse("is a folder, not an experiment file", Location(name))
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        refuse("not UTF-8 text; save the file as UTF-8", Location(name, line, column))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the file's name
        refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}", Location(name))
    return parse(text, name)


def parse(text: str, file: str = "<text>") -> Document:
    """Turn YAML text into a document; ``file`` is what its locations name.

    Raises:
        ConfigError: with one fault if the text is no YAML or over a limit, else with every
            duplicate key, key that is not text, unknown tag and unusable number.
    """
    node = compose(text, file)
    if node is None or (isinstance(node, Scalar) and not node.text):
        refuse("the file is empty", Location(file))
    values = Values()
    data = values.build(node)
    if not isinstance(data, dict):
        values.problems.append(((), "an experiment is a mapping, lines of 'key: value'", node.at))
    if values.problems:
        raise ConfigError(Fault(m, path_text(path, data), at) for path, m, at in values.problems)
    return Document(file, data, values.locations, text)


def path_text(path: Path, data: Any) -> str:
    """Return ``path`` as users read it: ``stages.kd.epochs``, ``datasets.train.transforms[0]``.

    An item of a list goes by its ``name`` if ``data`` has one for it, else by its index.
    """
    text = ""
    for segment in path:
        data = _child(data, segment)
        if isinstance(segment, int) and not _name(data):
            text += f"[{segment}]"
        else:
            text += f".{_name(data) if isinstance(segment, int) else segment}"
    return text.removeprefix(".")


def override(document: Document, assignments: Sequence[str]) -> Document:
    """Return a copy of ``document`` with assignments such as ``stages.kd.epochs=3`` carried out.

    An item of a list is named by its ``name`` or its index. Missing mappings on the way and a
    missing last key are added. The value is YAML; its location is the assignment.

    Raises:
        ConfigError: with a fault for each assignment that addresses nothing or has a bad value.
    """
    data, locations = _copy(document.data), dict(document.locations)
    faults: list[Fault] = []
    for assignment in assignments:
        at = Location(f"-s {assignment}")
        keys, equals, text = assignment.partition("=")
        try:
            if not equals:
                raise ValueError("'=' is missing; write e.g. stages.kd.epochs=3")
            _assign(data, locations, keys, text, at)
        except ConfigError as error:
            faults += [Fault(fault.message, keys, at) for fault in error.faults]
        except ValueError as error:
            faults.append(Fault(str(error), keys if equals else "", at))
    if faults:
        raise ConfigError(faults)
    done = (*document.overrides, *assignments)
    return Document(document.file, data, locations, document.text, done)


def _assign(
    data: dict[str, Any], locations: dict[Path, Location], keys: str, text: str, at: Location
) -> None:
    """Set one value in ``data``, which is changed."""
    path: Path = ()
    inside: Any = data
    *between, last = _segments(keys)
    for segment in between:
        key = _key_in(inside, segment)
        path = (*path, key)
        if isinstance(inside, dict) and key not in inside:
            inside[key], locations[path] = {}, at
        inside = inside[key]
        if not isinstance(inside, dict | list):
            value = "null" if inside is None else f"'{inside}'"
            raise ValueError(f"{path_text(path, data)} is {value}, which has nothing inside")
    path = (*path, _key_in(inside, last))
    value, paths = _value(text, path)
    inside[path[-1]] = value
    for known in [known for known in locations if known[: len(path)] == path]:
        del locations[known]
    locations.update(dict.fromkeys(paths, at))


def _value(text: str, path: Path) -> tuple[Any, list[Path]]:
    """Return the value that ``text`` is as YAML, and the paths of all that is in it."""
    node = compose(text, "<value>")
    if node is None:
        return None, [path]
    values = Values()
    value = values.build(node, path)
    if values.problems:
        raise ValueError("; ".join(message for _, message, _ in values.problems))
    if max(map(len, values.locations)) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value, list(values.locations)


def _segments(keys: str) -> list[str]:
    segments = re.sub(r"\[([0-9]+)\]", r".\1", keys.strip()).split(".")
    if "" in segments:
        raise ValueError("a name is missing; write e.g. stages.kd.epochs=3")
    if len(segments) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return segments


def _key_in(inside: dict[str, Any] | list[Any], segment: str) -> str | int:
    if isinstance(inside, dict):
        return segment
    names = [_name(item) for item in inside]
    if names.count(segment) > 1:
        raise ValueError(f"several items are named '{segment}'; give the index, from 0")
    if segment in names:
        return names.index(segment)
    indices = [str(i) for i in range(len(inside))]
    if segment in indices:
        return int(segment)
    near = did_you_mean(segment, names) or f"; there are {len(inside)}, from 0"
    raise ValueError(f"there is no item '{segment}'{near}")


def _child(data: Any, segment: str | int) -> Any:
    if isinstance(segment, int):
        return data[segment] if isinstance(data, list) and segment < len(data) else None
    return data.get(segment) if isinstance(data, dict) else None


def _name(item: Any) -> str:
    name = item.get("name") if isinstance(item, dict) else None
    return name if isinstance(name, str) else ""


def _copy(value: Any) -> Any:
    """A copy without shared parts; ``copy.deepcopy`` would keep what is shared shared."""
    if isinstance(value, dict):
        return {key: _copy(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_copy(child) for child in value]
    return value


def _similar_files(name: str) -> str:
    path = FilePath(name)
    try:
        near = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return f", nor a folder {path.parent}"
    return did_you_mean(path.name, near)
