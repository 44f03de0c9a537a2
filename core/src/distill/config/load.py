"""The way from a file on disk to an Experiment, with all faults of the frame at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill.config.experiment import Experiment, Gaps
from distill.config.overrides import override_experiment
from distill.config.resolve import resolve
from distill.config.schema import frame_faults
from distill.config.yaml_document import Document, Path, read
from distill.errors import ConfigError, Fault

UNNAMED = "unnamed"


def load(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        file: the YAML file.
        overrides: assignments such as ``stages.kd.optimizer.params.lr=0.1``.

    Raises:
        ConfigError: with every fault of the frame; components are checked by ``check``.
    """
    experiment, faults = draft(override_experiment(read(file), overrides))
    if experiment is None or faults:
        raise ConfigError(faults)
    return experiment


def draft(document: Document) -> tuple[Experiment | None, list[Fault]]:
    """Return what can be understood of a file, for further checks, and the faults so far."""
    frame = frame_faults(document)
    faults = [fault for _, fault in frame]
    data = copy.deepcopy(document.data)
    gaps: set[Path] = set()
    while frame:
        for path, _ in frame:
            gap = _leave_out(data, path)
            if gap is None:
                return None, faults
            gaps.add(gap)
        frame = frame_faults(replace(document, data=data))
    experiment, more = resolve(document, data, Gaps(frozenset(gaps)))
    return experiment, faults + more


def _leave_out(data: Any, path: Path) -> Path | None:
    """Take the value at ``path`` out of ``data``; return its place, ``None`` if all hangs on it."""
    if path in ((), ("name",)) and "stages" in data and data.get("name") != UNNAMED:
        data["name"] = UNNAMED
        return ("name",)
    if len(path) == 2 and path[0] == "stages" and isinstance(data["stages"][path[1]], dict):
        data["stages"][path[1]]["name"] = f"{UNNAMED}-{path[1]}"
        return (*path, "name")
    while path and isinstance(path[-1], int):
        path = path[:-1]  # the whole list, since the places of other items would shift
    if path in ((), ("datasets",), ("models",), ("stages",)):
        return None
    _remove(data, path)
    return path


def _remove(data: Any, path: Path) -> None:
    for key in path[:-1]:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return  # gone with something around it
    data.pop(path[-1], None)
