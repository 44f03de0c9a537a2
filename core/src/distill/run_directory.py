"""The folder of a run: one process at a time, one experiment, never overwritten by another."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import yaml

from distill import distributed
from distill.config.experiment import Experiment
from distill.config.yaml_document import Document, read
from distill.config.yaml_values import plain_value
from distill.errors import ConfigError, Fault, StorageError, as_yaml
from distill.registry import PluginRecord
from distill.training.checkpoint import write_atomically

GIVEN = "experiment.yaml"
OVERRIDES = "overrides.json"
RESOLVED = "resolved.yaml"
ENVIRONMENT = "environment.json"
"""What the observer ResultFiles writes, with the plugins of every session."""
LOCK = ".lock"
OF_ALL = (GIVEN, OVERRIDES, RESOLVED, LOCK)
"""What a run's folder holds before the run begins."""
_ABSENT = object()


@contextmanager
def open_run(root: Path, experiment: Experiment) -> Iterator[Path]:
    """Take hold of the experiment's folder under ``root``, new or from a stopped run.

    An error leaves no folder behind that was made here and holds nothing but the file of a run that
    has not begun.

    Raises:
        ConfigError: if a run of this name was started from another file; it names the keys.
        StorageError: if another process works in it.
    """
    directory = root / experiment.name
    if not distributed.is_main():
        yield directory
        return
    lock = filelock.FileLock(directory / LOCK)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise StorageError(f"another process is running in {directory}") from None
    except OSError as error:
        raise StorageError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        _claim(directory, experiment)
        yield directory
    except BaseException:
        _remove_unbegun(made)
        raise
    finally:
        lock.release()


def _remove_unbegun(made: Sequence[Path]) -> None:
    """Remove a run's folder, and those around it, if they were made for a run that did not begin.

    Args:
        made: the folders that were not there before, the run's first.
    """
    with suppress(OSError):  # what cannot be removed may stay: it is in nobody's way
        if not made or {file.name for file in made[0].iterdir()} - {*OF_ALL}:
            return
        for name in OF_ALL:
            (made[0] / name).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def forgotten_files(directory: Path, given: Iterable[Path]) -> list[str]:
    """Return which plugin files a run was last made with that are not given, by their names.

    Of a run that does not record its environment, and of none, nothing is known.
    """
    names = {file.name for file in given}  # which may be given from another folder
    return [file for file in _plugin_files(directory) if Path(file).name not in names]


def _plugin_files(directory: Path) -> list[str]:
    try:
        plugins = json.loads((directory / ENVIRONMENT).read_text("utf-8"))[-1]["plugins"]
        records = [PluginRecord(p["name"], p["distribution"], p["version"]) for p in plugins]
    except (OSError, ValueError, TypeError, LookupError):  # none, or an observer's of that name
        return []
    return [record.name for record in records if record.is_file]


def seed_directory(directory: Path, experiment: Experiment, seed: int) -> Path:
    """Return where one seed's checkpoint and students go: the run's folder if there is only one."""
    return directory if len(experiment.seeds) == 1 else directory / f"seed-{seed}"


def resolved_text(experiment: Experiment) -> str:
    """Return the experiment with defaults and inheritance filled in, itself a valid file."""
    plain = _plain(experiment.resolved)
    text: str = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _represent_text(_dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote text that PyYAML would leave bare though an experiment file takes it for a number."""
    try:
        is_text = isinstance(plain_value(text), str)
    except ValueError:
        is_text = False
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style=None if is_text else "'")


class _Dumper(yaml.SafeDumper):
    """Writes what an experiment file reads back as it was."""

    yaml_representers = {**yaml.SafeDumper.yaml_representers, str: _represent_text}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out where it stands, as inheritance means it."""
        return True


def _claim(directory: Path, experiment: Experiment) -> None:
    resolved = directory / RESOLVED
    # Without a checkpoint nothing is there to be lost: a first attempt failed before its first one.
    if resolved.exists() and any(directory.rglob("checkpoint.pt")):
        before = _read(resolved)
        changes = list(_changes(before, _plain(experiment.resolved), ""))
        if changes:
            raise ConfigError([_changed(directory, experiment, changes)])
        return
    _write(directory / GIVEN, experiment.document.text)
    _write(directory / OVERRIDES, json.dumps(experiment.document.overrides))
    _write(resolved, resolved_text(experiment))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, "utf-8"))


def _read(resolved: Path) -> Any:
    try:
        return read(resolved).data
    except ConfigError as error:
        raise StorageError(
            f"{resolved} is damaged, so that its run cannot be continued; move it away: {error}"
        ) from error


def _changed(directory: Path, experiment: Experiment, changes: list[str]) -> Fault:
    listed = "".join(f"\n  {change}" for change in changes)
    begun = _begun(directory, experiment.document)
    return Fault(
        f"{directory} holds a run of {begun} give this one another name (-s name=NEW), or move "
        f"that run away. What differs:{listed}",
        "name",
        experiment.document.locate(("name",)),
    )


def _begun(directory: Path, document: Document) -> str:
    """Return what a run was begun from and, if that can be told, how to go on with it."""
    other = "another version of this file"
    try:
        overrides = json.loads((directory / OVERRIDES).read_text("utf-8"))
        given = (directory / GIVEN).read_text("utf-8")
    except (OSError, ValueError):  # earlier versions kept no overrides
        return f"{other};"
    if overrides == list(document.overrides):
        return f"{other};"
    options = [word for override in overrides for word in ("-s", override)]
    command = shlex.join(["distill", "run", document.file, *options])
    if given.splitlines() != document.text.splitlines():
        return f"{other}, begun with `{command}`;"
    return (
        f"this file with other values from -s; to go on with it, write `{command}` (and other "
        "options as before). Else"
    )


def _changes(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{path}.{key}".lstrip(".")
            yield from _changes(before.get(key, _ABSENT), now.get(key, _ABSENT), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            name = new.get("name") if isinstance(new, Mapping) else None
            yield from _changes(old, new, f"{path}.{name}" if name else f"{path}[{number}]")
    elif before != now and not _is_unset(before, now, path):
        yield f"{path}: {_short(before)} -> {_short(now)}"


def _is_unset(before: Any, now: Any, path: str) -> bool:
    """Whether a key of ours is not given on either side, which it may say of itself by null."""
    is_ours = ".params." not in path
    return is_ours and all(value is None or value is _ABSENT for value in (before, now))


def _short(value: Any) -> str:
    text = "not given" if value is _ABSENT else as_yaml(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
