"""YAML text to a tree of nodes with positions; the limits on a file are held here.

PyYAML scans and parses; it neither composes nor constructs, so no tag can build an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import yaml

from distill.errors import ConfigError, Fault, Location, did_you_mean

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
TOO_LARGE = f"larger than the {MAX_BYTES} bytes an experiment file may have"

TEXT_TAG = "!!str"
JOIN_TAG = "!join"
SCALAR_TAGS = (None, TEXT_TAG, "!!int", "!!float", "!!bool", "!!null")


@dataclass(frozen=True)
class Scalar:
    """A single value as text; ``tag`` is None when the text itself decides what it is."""

    text: str
    tag: str | None
    at: Location


@dataclass(frozen=True)
class Items:
    """A list; ``tag`` is None unless the file gives one."""

    children: list[Node]
    tag: str | None
    at: Location


@dataclass(frozen=True)
class Entries:
    """A mapping as written: duplicate keys and merge keys are still in it."""

    children: list[tuple[Node, Node]]
    tag: str | None
    at: Location


Node = Scalar | Items | Entries


def compose(text: str, file: str) -> Node | None:
    """Return the root node of ``text``, or None if nothing is in it.

    Aliases are resolved: nodes may be shared, but the tree is finite, at most ``MAX_DEPTH`` deep
    and of at most ``MAX_VALUES`` values when written out.

    Raises:
        ConfigError: with one fault, for a text that is no YAML, has a cycle or is over a limit.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        refuse(TOO_LARGE, Location(file))
    loader: Any = None
    try:
        loader = yaml.SafeLoader(text)
        return _Composer(_events(loader), file).document()
    except yaml.reader.ReaderError as error:
        character = f"the character U+{ord(text[error.position]):04X} cannot stand in YAML"
        refuse(character, _location_of(text, error.position, file))
    except yaml.MarkedYAMLError as error:
        refuse(*_explain(error, file))
    except (ValueError, OverflowError):
        # PyYAML converts "\UFFFFFFFF" and the digits of %YAML without looking at their size.
        refuse("a number in an escape or directive is out of range", _at(loader.get_mark(), file))


def refuse(message: str, location: Location) -> NoReturn:
    """Raise the one fault after which a file cannot be read on."""
    raise ConfigError([Fault(message, "", location)])


class _Anchored(NamedTuple):
    node: Node
    values: int
    height: int


class _Composer:
    """Events to nodes in one pass; every limit is checked before the recursion it bounds."""

    def __init__(self, events: Iterator[Any], file: str):
        self._events = events
        self._file = file
        self._anchors: dict[str, _Anchored | None] = {}  # None while the node is still open
        self._values = 0
        self._deepest = 0
        self._joined = 0

    def document(self) -> Node | None:
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        node = self._node(next(self._events), 0)
        next(self._events)
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse("a second document starts here (---); one file is one experiment", event)
        return node

    def _node(self, event: Any, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if event.anchor in self._anchors:
            self._refuse(f"the anchor &{event.anchor} is already in use above", event)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        values, deepest, self._deepest = self._values, self._deepest, depth
        self._grow(1, depth, event)
        node = self._content(event, depth)
        if event.anchor is not None:
            size = self._values - values, self._deepest - depth
            self._anchors[event.anchor] = _Anchored(node, *size)
        self._deepest = max(deepest, self._deepest)
        return node

    def _content(self, event: Any, depth: int) -> Node:
        at, tag = self._at(event), _tag(event)
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, tag, at)
        if isinstance(event, yaml.SequenceStartEvent):
            children = [self._node(e, depth + 1) for e in self._until(yaml.SequenceEndEvent)]
            return self._join(children, event) if tag == JOIN_TAG else Items(children, tag, at)
        entries = [self._entry(e, depth + 1) for e in self._until(yaml.MappingEndEvent)]
        return Entries(entries, tag, at)

    def _entry(self, event: Any, depth: int) -> tuple[Node, Node]:
        key = self._node(event, depth)
        self._values -= 1  # an entry is one value, not two
        return key, self._node(next(self._events), depth)

    def _alias(self, event: Any, depth: int) -> Node:
        name = event.anchor
        if name not in self._anchors:
            near = did_you_mean(name, self._anchors)
            self._refuse(f"no anchor &{name} stands before the alias *{name}{near}", event)
        anchored = self._anchors[name]
        if anchored is None:
            self._refuse(f"the alias *{name} stands inside its own anchor &{name}: a cycle", event)
        self._grow(anchored.values, depth + anchored.height, event)
        return replace(anchored.node, at=self._at(event))

    def _join(self, children: list[Node], event: Any) -> Node:
        texts = [c.text for c in children if isinstance(c, Scalar) and c.tag in SCALAR_TAGS]
        if len(texts) < len(children):
            return Items(children, JOIN_TAG, self._at(event))
        self._joined += sum(map(len, texts))
        if self._joined > MAX_BYTES:
            self._refuse(f"all !join together give more than {MAX_BYTES} characters", event)
        return Scalar("".join(texts), TEXT_TAG, self._at(event))

    def _grow(self, values: int, depth: int, event: Any) -> None:
        self._values += values
        self._deepest = max(self._deepest, depth)
        if depth > MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} levels deep", event)
        if self._values > MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES} values, each use of an alias counted", event)

    def _until(self, end: type[Any]) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _at(self, event: Any) -> Location:
        return _at(event.start_mark, self._file)

    def _refuse(self, message: str, event: Any) -> NoReturn:
        refuse(_short(message), self._at(event))


def _events(loader: Any) -> Iterator[Any]:
    while loader.check_event():
        yield loader.get_event()


def _tag(event: Any) -> str | None:
    if event.tag is None:
        quoted = isinstance(event, yaml.ScalarEvent) and not event.implicit[0]
        return TEXT_TAG if quoted else None
    # Cut, because %TAG can give every node of a file a name of half a megabyte.
    return str(event.tag[:60]).replace("tag:yaml.org,2002:", "!!")


def _at(mark: Any, file: str) -> Location:
    return Location(file, mark.line + 1, mark.column + 1)


def _location_of(text: str, index: int, file: str) -> Location:
    lines = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text[:index])
    return Location(file, len(lines), len(lines[-1]) + 1)


_MEANINGS: tuple[tuple[str, str], ...] = (
    (r"character '\\t' that cannot start", "a tab cannot stand here: YAML is indented with spaces"),
    (r"character (.+) that cannot start", "a text cannot start with {0}; put it in quotes"),
    ("could not find expected ':'", "not a 'key: value'; is there a ':' and a space after it?"),
    ("expected ',' or '(.)'", "',' or '{0}' is missing; the bracket opened in line {line}"),
    (
        "mapping values",
        "a ':' cannot stand here; check the indentation, whether the line before lacks a ':', or "
        "quote the text",
    ),
    ("sequence entries", "a list item '-' cannot stand here; check the indentation"),
    ("expected <block end>", "does not fit what is above; check indentation, quotes and brackets"),
    ("unexpected end of stream", "the quote that opens here is never closed"),
    ("unknown escape", "unknown escape in double quotes; write \\\\ for \\, or use single quotes"),
    ("node content", "a value is missing here"),
)
_AT_THE_START = ("could not find expected ':'", "unexpected end of stream")


def _explain(error: yaml.MarkedYAMLError, file: str) -> tuple[str, Location]:
    """Say what a problem of PyYAML's scanner or parser means to whoever wrote the file."""
    problem = str(error.problem).replace(repr("\0"), "the end of the file")
    mark, start = error.problem_mark, error.context_mark
    message = f"not valid YAML: {error.context + ', ' if error.context else ''}{problem}"
    for pattern, meaning in _MEANINGS:
        if match := re.search(pattern, problem):
            message = meaning.format(*match.groups(), line=start.line + 1 if start else "?")
            break
    if start is not None and any(p in problem for p in _AT_THE_START):
        mark = start
    return _short(message), _at(mark, file)


def _short(message: str) -> str:
    return message if len(message) <= 300 else f"{message[:300]}..."
