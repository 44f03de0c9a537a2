"""Entry points -> Registry. Plugins load one by one, so that a broken one stops nobody else."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from distill import hookspecs
from distill.errors import PluginError, did_you_mean
from distill.registry import PRESETS, SINGULAR, Entry, PluginRecord, Registry

PREFIX = f"{hookspecs.PROJECT}_"


def plugins(files: Sequence[str | os.PathLike[str]] = ()) -> Registry:
    """Load every installed plugin, and the local ``files`` as plugins, into a Registry.

    Raises:
        PluginError: if a local file is missing or broken. A broken installed plugin is a record.
    """
    entries: list[Entry] = []
    records: list[PluginRecord] = []
    for point, distribution, version in _entry_points():
        record, offered = _load_entry_point(point, distribution, version)
        records.append(record)
        entries += offered
    for file in files:
        record, offered = _load_file(Path(file))
        records.append(record)
        entries += offered
    return Registry(entries, records)


def _entry_points() -> list[tuple[metadata.EntryPoint, str, str]]:
    """Return the plugins' entry points with the names and versions of their packages.

    Each comes once, though its package be found on two paths.
    """
    unique = {}
    for point in reversed(list(metadata.entry_points(group=hookspecs.PROJECT))):
        name, version = _distribution(point)
        unique[name, point.name, point.value] = point, name, version
    return [unique[key] for key in sorted(unique)]


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    dist = getattr(point, "dist", None)
    if dist is None:
        return "unknown package", ""
    package = dist.metadata  # read anew for each look
    return package["Name"], package["Version"]


def _load_entry_point(
    point: metadata.EntryPoint, name: str, version: str
) -> tuple[PluginRecord, list[Entry]]:
    try:
        module = point.load()
        offered = _offered(module, f"{name} {version}")
    # A plugin is foreign code: whatever it raises is its own fault and must not stop the others.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return PluginRecord(point.name, name, version, error=_cause(error)), []
    return PluginRecord(point.name, name, version, _names(offered)), offered


def _load_file(file: Path) -> tuple[PluginRecord, list[Entry]]:
    if not file.is_file():
        raise PluginError(f"-p {file}: there is no such file")
    name = f"distill_local_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    if spec is None or spec.loader is None:
        raise PluginError(f"-p {file}: is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled to loader workers
    try:
        spec.loader.exec_module(module)
        offered = _offered(module, str(file))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(f"-p {file}: {_cause(error, file)}") from error
    if not offered:
        raise PluginError(f"-p {file}: implements no hook; mark functions with @distill.hookimpl")
    return PluginRecord(str(file), str(file), "", _names(offered)), offered


def _offered(plugin: ModuleType, provider: str) -> list[Entry]:
    """Ask one plugin for everything it offers."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    _refuse_unknown_hooks(manager)
    return [
        Entry(kind, name, factory, provider)
        for kind in SINGULAR
        for implementation in getattr(manager.hook, PREFIX + kind).get_hookimpls()
        for name, factory in _valid(kind, implementation.function())
    ]


def _refuse_unknown_hooks(manager: pluggy.PluginManager) -> None:
    known = [PREFIX + kind for kind in SINGULAR]
    for hook in vars(manager.hook).values():
        if isinstance(hook, pluggy.HookCaller) and hook.name not in known and hook.get_hookimpls():
            raise PluginError(
                f"implements the unknown hook {hook.name}{did_you_mean(hook.name, known)}"
            )


def _valid(kind: str, components: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(components, Mapping):
        raise PluginError(
            f"{PREFIX}{kind} returned {_kind_of(components)}; it must return a dict "
            f"of name -> {'file' if kind == PRESETS else 'factory'}"
        )
    for name, factory in components.items():
        if not isinstance(name, str) or not _fits(kind, factory):
            needed = "file a path" if kind == PRESETS else "factory a class or function"
            raise PluginError(
                f"{PREFIX}{kind} offers {name!r}: {factory!r}; a name must be text and a {needed}"
            )
        yield name, factory


def _fits(kind: str, offer: object) -> bool:
    return isinstance(offer, hookspecs.PresetFile) if kind == PRESETS else callable(offer)


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _names(offered: Sequence[Entry]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for entry in offered:
        names.setdefault(entry.kind, []).append(entry.name)
    return names


def _cause(error: BaseException, file: Path | None = None) -> str:
    """Say what went wrong in one line, and in which line of the plugin."""
    text = f"{type(error).__name__}: {error}" if not isinstance(error, PluginError) else str(error)
    text = " ".join(text.split())
    if isinstance(error, SyntaxError) or file is None:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file.resolve())]
    return f"{text} (line {lines[-1]})" if lines else text
