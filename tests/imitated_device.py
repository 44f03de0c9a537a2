"""A device that is not there: tensors that say they are on it, computed on the CPU.

Where code leaves a tensor on the CPU that belongs on the device, it fails as on a GPU. What makes
the host wait for the device within a step of training is noted, with where in the project.
As a script: runs experiments on it, one after the other, and prints of each, as a line of JSON, the
error it ended with and its waits.

It rests on torch's devices written in Python, which torch calls experimental.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import distill
from distill import distributed

NAME = "imitated"
OTHERS = ("torch", "__main__", "click")
"""Packages whose frames say nothing of where in a project one is."""
aten: Any = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._copy_from}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
    aten.bincount,
    aten.histc,
    aten._linalg_eigh,
    aten._linalg_svd,
    aten._linalg_check_errors,
}
"""What CUDA's forms of these wait for: sizes, errors or numbers that they hand to the host."""
waits: set[str] = set()
"""Where in the project a step waited: file and function."""


class Imitated(torch.Tensor):
    """A tensor of the device, which keeps its numbers in one of the CPU."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> Imitated:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, on_cpu: torch.Tensor):
        self.on_cpu = on_cpu

    def __repr__(self) -> str:
        return f"Imitated({self.on_cpu})"

    def tolist(self) -> Any:
        _note()
        return self.on_cpu.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor on {NAME} has no numpy form: use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _computed(function, args, kwargs or {})


class _Module(_DummyBackendModule):
    """What torch asks of a device beside its tensors; it draws from the CPU's generator."""

    def get_rng_state(self, device: int = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: int = 0) -> None:
        pass

    def synchronize(self, device: int = 0) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def imitate() -> torch.device:
    """Let this process have the device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    # For tensors that are made on the device: there is none yet that ``Imitated`` could act for.
    library.fallback(lambda made, *args, **kwargs: _computed(made, args, kwargs), "PrivateUse1")
    _kept.append(library)
    return torch.device(NAME, 0)


_kept: list[Any] = []


def _computed(function: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU's tensors, and wrap what it gives if it is of the device."""
    operation = function.overloadpacket
    leaves = pytree.arg_tree_leaves(*args, **kwargs)
    is_here = any(isinstance(leaf, Imitated) for leaf in leaves)
    if is_here and operation not in COPIES:
        _refuse_others(function, args, leaves)
    if operation in WAITING or (operation in INDEXED and _has_mask(args[1])):
        _note()
    device = kwargs.get("device")
    goes_here = is_here if device is None else torch.device(device).type == NAME
    given = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
    given = {name: value for name, value in given.items() if name != "pin_memory"}
    out = function(*pytree.tree_map(_on_cpu, args), **pytree.tree_map(_on_cpu, given))
    if operation is aten._to_copy:
        if is_here and not goes_here:
            _note()
        out = out.clone() if out is _on_cpu(args[0]) else out
        return Imitated(out) if goes_here else out
    if operation is aten.copy_ and not isinstance(args[0], Imitated):
        _note()
        return args[0]
    if not goes_here or operation in (aten._local_scalar_dense, aten.equal):
        return out
    wrapped = pytree.tree_map_only(torch.Tensor, Imitated, out)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if is_here else wrapped


def _on_cpu(value: Any) -> Any:
    return value.on_cpu if isinstance(value, Imitated) else value


def _refuse_others(function: Any, args: Any, leaves: list[Any]) -> None:
    """Refuse tensors of the CPU beside those of the device, but single numbers."""
    others = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, Imitated)]
    if function.overloadpacket in INDEXED and isinstance(args[0], Imitated):
        if any(other.dim() for other in others):
            _note()  # torch copies an index to the device, for which the host waits
        return
    if any(other.dim() for other in others):
        shapes = ", ".join(str(tuple(other.shape)) for other in others)
        raise RuntimeError(f"{function}: on {NAME} and on the CPU, of shape {shapes}")


def _has_mask(indices: Any) -> bool:
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


def _note() -> None:
    """Note where the host waits, if that is in a step of training."""
    frames = list(_frames())
    if ("loop", "_read") in frames:  # for a log line
        return
    is_backward = threading.current_thread() is not threading.main_thread()
    if is_backward or ("loop", "epoch") in frames:
        waits.add(".".join(frames[0]) if frames else "torch")


def _frames():
    """Yield file and function of the project's frames, the innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in OTHERS:
            yield Path(frame.f_code.co_filename).stem, frame.f_code.co_name
        frame = frame.f_back


def main(arguments: list[str]) -> None:
    """Run experiments on the device, with what Python files offer."""
    device = imitate()
    distributed.device = lambda name: device
    files = [Path(argument) for argument in arguments]
    registry = distill.plugins([file for file in files if file.suffix == ".py"])
    for file in (file for file in files if file.suffix == ".yaml"):
        waits.clear()
        error = ""
        try:
            distill.run(distill.load(file), registry=registry)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"file": file.stem, "error": error, "waits": sorted(waits)}))


if __name__ == "__main__":
    main(sys.argv[1:])
