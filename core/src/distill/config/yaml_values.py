"""Nodes to plain values by the YAML 1.2 core schema, with the position of each value."""

from __future__ import annotations

import math
import re
from types import NoneType
from typing import Any

from distill.config.yaml_nodes import JOIN_TAG, SCALAR_TAGS, TEXT_TAG, Entries, Items, Node, Scalar
from distill.errors import Location

Path = tuple[str | int, ...]
"""Keys of mappings and indices of lists, from the top of the file."""

MAX_DIGITS = 100

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_TYPES = {"!!int": int, "!!float": float, "!!bool": bool, "!!null": NoneType}
_MERGE = "<<"


class Values:
    """Builds values; what is wrong is collected, so that one look finds all of it.

    Attributes:
        locations: where each value stands; the key of a mapping entry, else the value itself.
        problems: path, message and location of everything that is wrong.
    """

    def __init__(self) -> None:
        self.locations: dict[Path, Location] = {}
        self.problems: list[tuple[Path, str, Location]] = []
        self._seen: set[tuple[str, Location]] = set()

    def build(self, node: Node, path: Path = ()) -> Any:
        """Return the value of ``node``; no two places of the result share a list or mapping."""
        self.locations.setdefault(path, node.at)
        if isinstance(node, Scalar):
            return self._scalar(node, path)
        if isinstance(node, Items):
            self._check_tag(node, "!!seq", path)
            return [self.build(child, (*path, i)) for i, child in enumerate(node.children)]
        values = {}
        for name, (key, child) in self._entries(node, path).items():
            inner = (*path, name)
            self.locations[inner] = key.at
            values[name] = self.build(child, inner)
        return values

    def _scalar(self, node: Scalar, path: Path) -> Any:
        if node.tag in SCALAR_TAGS:
            try:
                return _resolve(node.text, node.tag)
            except ValueError as error:
                self._fault(path, str(error), node.at)
        else:
            self._fault(path, _tag_message(node), node.at)
        return None

    def _entries(self, node: Entries, path: Path) -> dict[str, tuple[Node, Node]]:
        """Return key node and value node by name, merge keys resolved; explicit keys win."""
        self._check_tag(node, "!!map", path)
        merged: dict[str, tuple[Node, Node]] = {}
        own: dict[str, tuple[Node, Node]] = {}
        merge: Node | None = None
        for key, child in node.children:
            name = self._key(key, path)
            first = merge if _is_merge(key) else own[name][0] if name in own else None
            if first is not None:
                lines = f"in lines {first.at.line} and {key.at.line}"
                self._fault((*path, str(name)), f"the key '{name}' is given twice, {lines}", key.at)
            elif _is_merge(key):
                merge, merged = key, self._merged(child, path)
            elif name is not None:
                own[name] = (key, child)
        return merged | own

    def _merged(self, node: Node, path: Path) -> dict[str, tuple[Node, Node]]:
        bases = node.children if isinstance(node, Items) and node.tag is None else [node]
        entries: dict[str, tuple[Node, Node]] = {}
        for base in bases:
            if isinstance(base, Entries):
                for name, entry in self._entries(base, path).items():
                    entries.setdefault(name, entry)
            else:
                self._fault(path, f"{_MERGE} takes a mapping or a list of mappings", base.at)
        return entries

    def _key(self, key: Node, path: Path) -> str | None:
        if not isinstance(key, Scalar):
            self._fault(path, "keys are text, not lists or mappings", key.at)
        elif key.tag not in SCALAR_TAGS:
            self._fault(path, _tag_message(key), key.at)
        elif isinstance(name := self._scalar(key, path), str):
            return name
        else:
            self._fault(path, f'keys are text; put it in quotes: "{key.text[:60]}"', key.at)
        return None

    def _check_tag(self, node: Items | Entries, standard: str, path: Path) -> None:
        if node.tag not in (None, standard):
            self._fault(path, _tag_message(node), node.at)

    def _fault(self, path: Path, message: str, at: Location) -> None:
        # Where an alias repeats a part of the file, its faults are told once.
        if (message, at) not in self._seen:
            self._seen.add((message, at))
            self.problems.append((path, message, at))


def _is_merge(key: Node) -> bool:
    return isinstance(key, Scalar) and key.tag is None and key.text == _MERGE


def _tag_message(node: Node) -> str:
    if node.tag == JOIN_TAG:
        return f"{JOIN_TAG} takes a list of single values"
    return f"the tag {node.tag} is not known: files are data and no tag builds objects"


def _resolve(text: str, tag: str | None) -> Any:
    value = text if tag == TEXT_TAG else plain_value(text)
    if isinstance(value, str) and _UNWRITABLE.search(value):
        raise ValueError("the text has a character that no file or file name can hold")
    if tag is None or tag == TEXT_TAG:
        return value
    if tag == "!!float" and type(value) is int:
        return float(value)
    if type(value) is not _TYPES[tag]:
        raise ValueError(f"'{text[:60]}' does not fit the tag {tag}")
    return value


def plain_value(text: str) -> Any:
    """Return what a text without quotes and tag stands for.

    Raises:
        ValueError: if it is a number that is too large.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        if len(text.lstrip("+-")) > MAX_DIGITS:
            raise ValueError(f"a whole number of more than {MAX_DIGITS} digits")
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _FLOAT.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            raise ValueError(f"{text[:60]} is too large for a number; write .inf for infinity")
        return value
    return text
