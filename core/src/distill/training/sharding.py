"""Tensors of which each process holds a part (FSDP), and what has to be whole."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distill import distributed
from distill.config.experiment import Stage
from distill.data.batch import map_tensors


def is_sharded(stage: Stage) -> bool:
    """Whether each process holds but a part of a stage's parameters."""
    return stage.parallel == "fsdp" and distributed.world_size() > 1


def whole(value: Any) -> Any:
    """Return ``value`` with every parted tensor gathered; every process must ask for it."""
    return map_tensors(lambda t: t.full_tensor() if is_parted(t) else t, value)  # type: ignore[attr-defined]


def parted(state: dict[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return an optimizer's whole state in parts like its parameters'."""
    if not any(map(is_parted, parameters)):
        return state
    return {
        **state,
        "state": {
            number: {name: _like(value, parameters[number]) for name, value in kept.items()}
            for number, kept in state["state"].items()
        },
    }


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every element is finite, on all processes, which wait for their device to tell."""
    return not tensors or not_finite_anywhere(tensors, tensors[0].device).item() == 0


def not_finite_anywhere(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a scalar on the device, 1 if an element is not finite on any process, else 0.

    Weights, and gradients that DDP has averaged, are alike everywhere: each process finds the same
    for itself. Of parted ones each looks at its own, and all are asked.
    """
    found = torch.zeros((), device=device, dtype=torch.float32)
    for same in _by_type([local_part(tensor) for tensor in tensors]):
        # What GradScaler looks for overflows with: a single pass, which multiplies by 1 here.
        torch._amp_foreach_non_finite_check_and_unscale_(same, found, _one(device))
    if tensors and is_parted(tensors[0]):  # all are, or none
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def _by_type(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return the values of tensors, those of one type together."""
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        groups.setdefault(tensor.dtype, []).append(values)
    return list(groups.values())


@torch.no_grad()
def load(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Overwrite what a module holds, whole or in parts, with whole values."""
    for name, tensor in module.state_dict().items():
        local_part(tensor).copy_(local_part(_like(state[name], tensor)))


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device, dtype=torch.float32)


def is_parted(value: Any) -> bool:
    """Whether each process holds a part of a tensor only."""
    # Looked up, since importing it takes a second and nobody but FSDP needs it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Any) -> torch.Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if is_parted(tensor) else tensor  # type: ignore[no-any-return]


def _like(value: Any, parameter: Any) -> Any:
    is_alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    if not is_alike or not is_parted(parameter):
        return value
    module = sys.modules["torch.distributed.tensor"]
    on_device = value.to(parameter.device)
    return module.distribute_tensor(on_device, parameter.device_mesh, parameter.placements)
