"""The way from a file on disk to an Experiment, with all faults of the frame at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill.config.experiment import Experiment
from distill.config.resolve import resolve
from distill.config.schema import frame_faults
from distill.config.yaml_document import Document, Path, override, read
from distill.errors import ConfigError, Fault


def load(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        file: the YAML file.
        overrides: assignments such as ``stages.kd.optimizer.params.lr=0.1``.

    Raises:
        ConfigError: with every fault of the frame; components are checked by ``check``.
    """
    experiment, faults = draft(override(read(file), overrides))
    if experiment is None or faults:
        raise ConfigError(faults)
    return experiment


def draft(document: Document) -> tuple[Experiment | None, list[Fault]]:
    """Return what can be understood of a file, for further checks, and the faults so far."""
    frame = frame_faults(document)
    faults = [fault for _, fault in frame]
    data = copy.deepcopy(document.data)
    removed: set[Path] = set()
    while frame:
        for path, _ in frame:
            blamed = _removable(path)
            if len(blamed) < 2:  # a whole section or stage is missing or of the wrong kind
                return None, faults
            _remove(data, blamed)
            removed.add(blamed)
        frame = frame_faults(replace(document, data=data))
    experiment, more = resolve(replace(document, data=data), frozenset(removed))
    if experiment is not None:
        experiment = replace(experiment, document=document)
    return experiment, faults + more


def _removable(path: Path) -> Path:
    """Return what to take out: the list around an item, since the places of others would shift."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    return path


def _remove(data: Any, path: Path) -> None:
    for key in path[:-1]:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return  # gone with something around it
    data.pop(path[-1], None)
