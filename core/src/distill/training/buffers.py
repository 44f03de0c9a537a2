"""Trial forwards that leave no trace in a module's buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give buffers back what they held: running statistics, memory banks, counters."""
    before = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffers, held in before:  # those that a forward made anew or replaced
            buffers.clear()
            buffers.update(held)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
