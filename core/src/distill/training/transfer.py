"""Batches on their way to a GPU while it works on the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from distill.data.batch import Batch, map_tensors


def copied_ahead(
    batches: Iterable[Batch], device: torch.device, memory_format: torch.memory_format | None
) -> Iterator[Batch]:
    """Yield batches on a GPU, each one copied in a stream of its own a step ahead.

    Copies overlap with the work on the batch before as far as batches lie in page-locked memory.
    """
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event | None] | None = None
    for batch in batches:
        following: tuple[Batch, torch.cuda.Event | None]
        if _is_on_host(batch):
            with torch.cuda.stream(stream):
                placed = batch.to(device, non_blocking=True, memory_format=memory_format)
                following = placed, stream.record_event()
        else:  # what has been put together on the device belongs to the stream of the step
            placed = batch.to(device, non_blocking=True, memory_format=memory_format)
            following = placed, None
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead)


def _is_on_host(batch: Batch) -> bool:
    devices: set[str] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        devices.add(tensor.device.type)
        return tensor

    map_tensors(note, (batch.inputs, batch.targets, batch.extras))
    return devices <= {"cpu"}


def _arrived(batch: Batch, event: torch.cuda.Event | None) -> Batch:
    """Let the step wait for a batch on the device, not on the host."""
    if event is None:
        return batch
    current = torch.cuda.current_stream()
    current.wait_event(event)

    def used(tensor: torch.Tensor) -> torch.Tensor:
        # Or its memory might go to the next copy while this step still reads it.
        if tensor.device.type == "cuda":
            tensor.record_stream(current)
        return tensor

    return batch.map(used)
