"""Ready experiment files that plugins bring: to list, to read, to copy."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distill.errors import PluginError, StorageError, UsageError
from distill.registry import PRESETS, Entry, Registry


class Preset(NamedTuple):
    """A preset as it is listed; ``description`` is its first line, without the ``#``."""

    name: str
    description: str
    provider: str


def listed(registry: Registry, text: str = "") -> list[Preset]:
    """Return the presets in whose name, description or package ``text`` occurs, by name.

    Raises:
        UsageError: if there are presets, but none of them with ``text``.
    """
    known = [_described(entry) for entry in registry.entries(PRESETS)]
    found = [preset for preset in known if text.lower() in _searched(preset)]
    if known and not found:
        raise UsageError(f"no preset has '{text}' in its name, description or package")
    return found


def preset_text(registry: Registry, name: str) -> str:
    """Return the text of a preset.

    Raises:
        PluginError: if there is none of that name, two offer it, or its file is gone.
    """
    return _read(registry.find(PRESETS, name))


def copy_preset(registry: Registry, name: str, target: Path, *, overwrite: bool = False) -> Path:
    """Write a preset to ``target``, or to ``<name>.yaml`` in it if it is a folder; return where.

    Raises:
        PluginError: as ``preset_text``.
        StorageError: if the file exists and is not to be overwritten, or cannot be written.
    """
    text = preset_text(registry, name)
    file = target / f"{name}.yaml" if target.is_dir() else target
    try:
        with file.open("w" if overwrite else "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise StorageError(f"{file} exists; --force overwrites it") from None
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}") from error
    return file


def _described(entry: Entry) -> Preset:
    try:
        first = _read(entry).partition("\n")[0]
    except PluginError as error:  # told here, so that the others are listed all the same
        return Preset(entry.name, str(error), entry.provider)
    description = first.removeprefix("#").strip() if first.startswith("#") else ""
    return Preset(entry.name, description, entry.provider)


def _searched(preset: Preset) -> str:
    return f"{preset.name}\n{preset.description}\n{preset.provider}".lower()


def _read(entry: Entry) -> str:
    try:
        text: str = entry.factory.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise PluginError(
            f"preset '{entry.name}' of {entry.provider} cannot be read: {error}"
        ) from error
    return text
