"""Weights and run states on disk: written whole or not at all, read as data only."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from distill.errors import StorageError

FORMAT = 1


def peer_file(model: str) -> str:
    """Return the name, less its ending, of what a stage writes of a model beside its student."""
    return f"{model}.last"


def save_weights(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a module's state dict as safetensors that load strictly into its class."""
    # Clones part tied weights, which the format refuses.
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    write_atomically(path, lambda file: safetensors.torch.save_file(plain, file))


def load_weights(module: nn.Module, path: Path) -> None:
    """Read a safetensors file into ``module``, every name and shape of which must fit.

    Raises:
        ValueError: if the file is missing, of another kind, damaged, or of another architecture.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path} (looked in {Path.cwd()})")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; other formats can run code. Convert it once where "
            "you trust it: safetensors.torch.save_file(torch.load(old, weights_only=True), new)"
        )
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    differences = _differences(module.state_dict(), state)
    if differences:
        raise ValueError(
            f"{path} is of another architecture than {type(module).__name__}: "
            + "; ".join(differences)
        )
    module.load_state_dict(state, strict=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's state: tensors, numbers, text, lists and dicts only."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read a run's state.

    Raises:
        StorageError: if it is damaged or of another version.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own texts recommend unsafe loading
        raise StorageError(
            f"{path} is damaged and cannot be continued from; move it away to start its seed anew"
        ) from error
    if state.get("format") != FORMAT:
        raise StorageError(
            f"{path} was written by another version of distill (format {state.get('format')}, "
            f"this one reads {FORMAT})"
        )
    return state


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file and rename it to ``path`` once it is safely on disk.

    Raises:
        StorageError: if it cannot be written; ``path`` is then what it was before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    # torch reports a full disk as RuntimeError, safetensors as its own error.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error}") from error


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _differences(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Say in at most three parts what a state dict lacks, has too much, or in other shapes."""
    missing = [name for name in own if name not in given]
    unknown = [name for name in given if name not in own]
    shapes = [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    parts = [("lacks", missing), ("has the unknown", unknown), ("", shapes)]
    return [f"{verb} {_first(names)}".strip() for verb, names in parts if names]


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
