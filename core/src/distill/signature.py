"""Check parameters from a file against a factory's signature and type hints, and convert them.

A file holds text, numbers, lists and mappings; a factory may want an enum member, a tuple or a
``torch.dtype``. Hints say which. What has no hint is passed on as it stands.
"""

from __future__ import annotations

import collections.abc
import enum
import inspect
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distill.errors import did_you_mean

LONGEST_LIST_SHOWN = 40


@dataclass(frozen=True)
class Problem:
    """A parameter that does not fit: ``key`` is empty where one is missing."""

    key: str
    message: str


@dataclass(frozen=True)
class Binding:
    """Parameters ready for the call, and what is wrong with the others."""

    arguments: dict[str, Any]
    problems: list[Problem]


class _Mismatch(Exception):
    """A value does not fit a hint: what was expected, and ``nearest`` the names that come near."""

    def __init__(self, expected: str, nearest: str = ""):
        super().__init__(expected)
        self.nearest = nearest


def bind(factory: Callable[..., Any], params: Mapping[str, Any], *, provided: int = 0) -> Binding:
    """Match ``params`` with the signature of ``factory``, whose first ``provided`` are given."""
    accepted, open_ended = _accepted(factory, provided)
    arguments: dict[str, Any] = {}
    problems: list[Problem] = []
    unknown = [key for key in params if key not in accepted and not open_ended]
    for key, value in params.items():
        if key not in accepted:
            if open_ended:
                arguments[key] = value
            else:
                problems.append(Problem(key, _unknown(key, accepted)))
            continue
        try:
            arguments[key] = _convert(value, accepted[key].annotation)
        except _Mismatch as expected:
            text = f"expected {expected}, got {show(value)}{expected.nearest}"
            problems.append(Problem(key, text))
    problems += [
        Problem("", f"the parameter '{name}' is missing")
        for name, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty
        and name not in params
        and not any(did_you_mean(key, [name]) for key in unknown)
    ]
    return Binding(arguments, problems)


def wired_parameters(forward: Callable[..., Any]) -> dict[str, bool]:
    """Return the names ``forward`` takes its tensors by, and whether each one is required."""
    return {
        name: parameter.default is inspect.Parameter.empty
        for name, parameter in inspect.signature(forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def show(value: Any) -> str:
    """Describe a value of a file for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, Mapping):
        return "a mapping"
    return f"the list {value}" if len(str(value)) <= LONGEST_LIST_SHOWN else "a list"


def _accepted(
    factory: Callable[..., Any], provided: int
) -> tuple[dict[str, inspect.Parameter], bool]:
    parameters = list(_signature(factory).parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p for p in named[provided:]}, open_ended


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory, eval_str=True)
    except NameError:  # hints imported for type checkers only
        return inspect.signature(factory)


def _unknown(key: str, accepted: Mapping[str, Any]) -> str:
    hint = did_you_mean(key, accepted) or f" (known: {', '.join(accepted) or 'none'})"
    return f"there is no parameter '{key}'{hint}"


def _convert(value: Any, hint: Any) -> Any:
    if hint is inspect.Parameter.empty or hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return value
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _convert(value, typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint))
    if origin is typing.Literal:
        options = [option for option in typing.get_args(hint) if type(option) is type(value)]
        return _expect(value in options, value, _describe(hint))
    if hint is None or hint is types.NoneType:
        return _expect(value is None, value, "nothing")
    return _convert_class(value, hint, origin if origin is not None else hint)


def _convert_union(value: Any, options: tuple[Any, ...]) -> Any:
    enums = [o for o in options if isinstance(o, type) and issubclass(o, enum.Enum)]
    for cls in enums:  # `str | Interpolation` means a member where the text names one
        if isinstance(value, str) and value in cls.__members__:
            return cls[value]
    # `dtype | dict` must not turn the text float32 into something else: exact classes first.
    for exact in (True, False):
        for option in options:
            if exact and not (isinstance(option, type) and type(value) is option):
                continue
            try:
                return _convert(value, option)
            except _Mismatch:
                pass
    raise _Mismatch(" or ".join(dict.fromkeys(map(_describe, options))))


def _convert_class(value: Any, hint: Any, cls: Any) -> Any:
    if cls in _PLAIN:
        return _PLAIN[cls](value, hint)
    if not isinstance(cls, type):
        return value
    if issubclass(cls, enum.Enum):
        return _enum_member(value, cls)
    if cls.__module__ == "torch":
        return _torch_value(value, cls.__name__)
    if issubclass(cls, collections.abc.Mapping):
        return _expect(isinstance(value, Mapping), value, "a mapping")
    if cls is not object and issubclass(cls, collections.abc.Callable):  # type: ignore[arg-type]
        return value
    return _sequence(value, hint, cls) if issubclass(cls, collections.abc.Iterable) else value


def _sequence(value: Any, hint: Any, cls: type) -> Any:
    expected = _describe(hint)
    _expect(isinstance(value, (list, tuple)), value, expected)
    args = typing.get_args(hint)
    is_counted = cls is tuple and bool(args) and args[-1] is not Ellipsis
    hints = args if is_counted else (args[:1] or (Any,)) * len(value)
    _expect(len(value) == len(hints), value, expected)
    try:
        items = [_convert(item, inner) for item, inner in zip(value, hints, strict=True)]
    except _Mismatch:
        raise _Mismatch(expected) from None
    return cls(items) if cls in (tuple, set, frozenset) else items


def _enum_member(value: Any, cls: type[enum.Enum]) -> enum.Enum:
    for member in cls:
        if type(value) is type(member.value) and value == member.value:
            return member
    members = {name.lower(): member for name, member in cls.__members__.items()}  # and aliases
    name = str(value).lower().removeprefix(f"{cls.__name__.lower()}.")
    if name not in members:
        nearest = did_you_mean(str(value), cls.__members__)
        raise _Mismatch(f"one of {', '.join(cls.__members__) or 'nothing'}", nearest)
    return members[name]


def _torch_value(value: Any, name: str) -> Any:
    """Turn text into a dtype or device, and a list of numbers into a tensor."""
    torch = sys.modules["torch"]  # loaded, since the hint came from it
    if name == "dtype":
        found = getattr(torch, str(value).removeprefix("torch."), None)
        return _expect(isinstance(found, torch.dtype), found, "a type such as float32 or uint8")
    if name == "Tensor":
        _expect(isinstance(value, (list, tuple)), value, "a list of numbers")
        try:  # as floats, since that is what losses weigh with
            return torch.tensor(value, dtype=torch.get_default_dtype())
        except (TypeError, ValueError):
            raise _Mismatch("a list of numbers") from None
    return value


def _number(value: Any, _hint: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _expect(is_number, value, "a number")


def _whole_number(value: Any, _hint: Any) -> Any:
    return _expect(type(value) is int, value, "a whole number")


def _boolean(value: Any, _hint: Any) -> Any:
    return _expect(isinstance(value, bool), value, "true or false")


def _text(value: Any, _hint: Any) -> Any:
    return _expect(isinstance(value, str), value, "text")


def _path(value: Any, hint: Any) -> Any:
    return pathlib.Path(_text(value, hint))


def _mapping(value: Any, hint: Any) -> Any:
    return _expect(isinstance(value, Mapping), value, _describe(hint))


_PLAIN: dict[Any, Callable[[Any, Any], Any]] = {
    int: _whole_number,
    float: _number,
    complex: _number,
    bool: _boolean,
    str: _text,
    os.PathLike: _text,
    pathlib.Path: _path,
    dict: _mapping,
}


def _expect(fits: bool, value: Any, expected: str) -> Any:
    if not fits:
        raise _Mismatch(expected)
    return value


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    pathlib.Path: "text",
    os.PathLike: "text",
    dict: "a mapping",
    types.NoneType: "nothing",
}


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    args = typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, args)))
    if origin in _WORDS:
        return _WORDS[origin]
    if isinstance(origin, type):
        if issubclass(origin, enum.Enum):
            return "one of " + ", ".join(member.name for member in origin)
        if origin.__module__ == "torch":
            return "a list of numbers" if origin.__name__ == "Tensor" else f"a {origin.__name__}"
        if issubclass(origin, collections.abc.Mapping):
            return "a mapping"
        if issubclass(origin, collections.abc.Iterable):
            return _describe_list(origin, args)
        return getattr(origin, "__name__", str(origin))
    return str(origin)


def _describe_list(cls: type, args: tuple[Any, ...]) -> str:
    items = [arg for arg in args if arg is not Ellipsis]
    if not items:
        return "a list"
    count = f"{len(items)} " if cls is tuple and len(items) == len(args) else ""
    return f"a list of {count}{_plural(_describe(items[0]))}"


def _plural(noun: str) -> str:
    if noun.startswith("a list"):
        return f"lists{noun.removeprefix('a list')}"
    return f"{noun.removeprefix('a ')}s" if noun.startswith("a ") else noun
