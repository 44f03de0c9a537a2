"""Rank, world size and the few collectives in use; every function works without a group too."""

from __future__ import annotations

import atexit
import gc
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distill.errors import DistillError

TIMEOUT = timedelta(minutes=10)


def rank() -> int:
    """Return this process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process prints and writes."""
    return rank() == 0


def join(device: torch.device) -> None:
    """Join the processes that torchrun started, until this one ends.

    Not until a run ends: a process that joins for the next one while another still leaves would
    meet a store that is about to close, and wait there for good.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    atexit.register(_leave)


def _leave() -> None:
    gc.collect()  # what was sharded refers to the group, and must not outlive it
    dist.destroy_process_group()


def device(name: str) -> torch.device:
    """Return the device to run on; ``auto`` takes this process's GPU where there is one.

    Raises:
        DistillError: if the device asked for is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise DistillError(f"{name} was asked for, but torch sees no GPU here; use cpu")
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    chosen = torch.device(name)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def sum_over_ranks(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the elementwise sum over all processes, exchanged on the models' ``device``."""
    if world_size() == 1:
        return values
    on_device = values.to(device)
    dist.all_reduce(on_device)
    return on_device


def from_main(value: Any) -> Any:
    """Return the main process's ``value`` in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every process's ``value``, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_main(tensors: list[torch.Tensor]) -> None:
    """Overwrite ``tensors`` with the main process's values."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
