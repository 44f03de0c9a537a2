"""Reference -> value: which module takes which values, decided once and followed every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from distill.errors import DistillError, did_you_mean

Values = dict[str, Any]
"""Every value of a step under the reference that names it."""

Timer = Callable[[str, str, Callable[[], Any]], Any]
"""Calls a part of a step and returns what that returns: kind of the part, name, the call."""


@dataclass(frozen=True)
class Address:
    """Where a reference's value is found: a value's name, then keys into it."""

    text: str
    value: str
    keys: tuple[str, ...] = ()

    def read(self, values: Values) -> Any:
        """Return the value.

        Raises:
            DistillError: if a key is not in the output.
        """
        value = values[self.value]
        for key in self.keys:
            value = self._item(value, key)
        return value

    def _item(self, value: Any, key: str) -> Any:
        if isinstance(value, Mapping) and key in value:
            return value[key]
        if isinstance(value, (list, tuple)) and key.isdigit() and int(key) < len(value):
            return value[int(key)]
        if isinstance(value, Mapping):
            offered = [str(k) for k in value]
            hint = did_you_mean(key, offered) or f" (it has: {', '.join(offered)})"
        else:
            hint = f"; it is {describe(value)}"
        raise DistillError(f"'{self.text}': '{self.value}' has no part '{key}'{hint}")


Source = Address | tuple[Address, ...]
"""Where one argument comes from; several addresses make a list of values."""


@dataclass(frozen=True)
class Call:
    """One auxiliary module or loss and the addresses of what its ``forward`` takes."""

    name: str
    module: nn.Module
    arguments: Mapping[str, Source]

    def __call__(self, values: Values) -> Any:
        """Return what the module gives for its arguments.

        Raises:
            CallError: if an argument is not there or the module fails.
        """
        return self.run(self.module, values)

    def set_up(self, values: Values, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Let a module that finds its shapes in what it is fed build its layers.

        Args:
            values: as for a call.
            more: arguments beside those of a call, by name.

        Raises:
            CallError: as a call.
        """
        setup: Callable[..., Any] = self.module.setup  # type: ignore[assignment]
        self.run(partial(setup, **more), values)

    def addresses(self) -> Iterator[Address]:
        """Yield where the arguments are found."""
        for source in self.arguments.values():
            yield from (source,) if isinstance(source, Address) else source

    def run(self, function: Callable[..., Any], values: Values) -> Any:
        """Call the module, or a method of it, with its arguments."""
        try:
            arguments = {name: _read(source, values) for name, source in self.arguments.items()}
        except DistillError as error:
            raise CallError(self.module, str(error)) from error
        try:
            return function(**arguments)
        except (torch.OutOfMemoryError, DistillError):
            raise
        except Exception as error:  # the module is foreign code
            shapes = {tensor.shape for tensor in _tensors(arguments.values())}
            message = self._failure(arguments, error)
            raise CallError(self.module, message, shapes_differ=len(shapes) > 1) from error

    def _failure(self, arguments: Mapping[str, Any], error: Exception) -> str:
        given = ", ".join(
            f"{name}={_text(self.arguments[name])} {describe(value)}"
            for name, value in arguments.items()
        )
        return f"{type(self.module).__name__} failed on {given}: {first_line(error)}"


def _read(source: Source, values: Values) -> Any:
    if isinstance(source, Address):
        return source.read(values)
    return [address.read(values) for address in source]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _text(source: Source) -> str:
    if isinstance(source, Address):
        return source.text
    return f"[{', '.join(address.text for address in source)}]"


class CallError(DistillError):
    """An auxiliary module or loss, ``module``, failed on what it was given."""

    def __init__(self, module: nn.Module, message: str, *, shapes_differ: bool = False):
        self.module = module
        self.shapes_differ = shapes_differ
        super().__init__(message)


def first_line(error: Exception) -> str:
    """Return what an error of foreign code says, in one line."""
    kind, text = type(error).__name__, str(error).strip()
    if isinstance(error, UserWarning):  # torch's, of tensors that it would have to stretch
        return "their shapes differ"
    if not text:
        return kind
    first = text.splitlines()[0]
    return first if isinstance(error, (RuntimeError, ValueError)) else f"{kind}: {first}"


def describe(value: Any) -> str:
    """Describe a value by its shape."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(describe(item) for item in value)}]"
    return type(value).__name__


def value_name(role: str, path: str) -> str:
    """Return the name of a captured value: ``student.layer2``, ``teacher:input``."""
    return f"{role}{'' if not path or path[0] in '@:' else '.'}{path}"
