"""One module over many processes: DDP, or FSDP2 for models that do not fit into one device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill import distributed
from distill.data.batch import Batch
from distill.model.criterion import TOTAL
from distill.model.distiller import Distiller
from distill.reference import STUDENT
from distill.training.traceless import buffers_kept

Hold = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Parallel:
    """A module to call, and the context in which its gradients are not exchanged yet."""

    module: nn.Module
    hold: Hold = nullcontext


def averaged_over_ranks(module: nn.Module, batch: Batch, *, leaves_unused: bool) -> Parallel:
    """Let gradients be averaged over processes (DDP); alone, the module stays as it is.

    ``batch`` is run through twice first, and its traces removed: torch puts gradients into other
    buckets after the first backward of each process, which would change the order of additions
    between a run and its continuation.
    """
    if distributed.world_size() == 1:
        return Parallel(module)
    with warnings.catch_warnings():
        # The new name of the argument is not known to the oldest torch that distill runs with.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            broadcast_buffers=False,
            find_unused_parameters=leaves_unused,
            gradient_as_bucket_view=True,
        )
    _warm_up(wrapped, module, batch)
    return Parallel(wrapped, wrapped.no_sync)


def shard(distiller: Distiller, device: torch.device, more: Iterable[nn.Module] = ()) -> Parallel:
    """Let each process hold a part of every parameter (FSDP2), for good.

    What stands in a row (``nn.Sequential``, ``nn.ModuleList``) and has parts of its own is gathered
    for its forward and backward by itself, then models, auxiliary modules and losses.

    Args:
        distiller: on the CPU; its parts go to ``device``.
        device: of this process.
        more: modules that are called beside the distiller, such as an average of the student.
    """
    # Imported here, since it takes a second that nobody else should wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    models = [*distiller.models().values(), *more]
    parts = [*models, *distiller.auxiliary, *distiller.criterion.modules_of_terms]
    for part in parts:
        part.to(memory_format=torch.contiguous_format)  # FSDP takes no other
        # A backward that does not come through a module's output does not gather it again.
        is_entered = part is not distiller.student or distiller.parts_asked(STUDENT) != []
        # What calls the blocks of an auxiliary module or loss is foreign code: gathered in whole.
        blocks = _blocks(part) if part in models else []
        for block in [*blocks, part]:
            # Said outright: an average is called beside the distiller, and would stay whole.
            fully_shard(block, mesh=mesh, reshard_after_forward=is_entered)
        part.to(device)  # the buffers
    fully_shard(distiller, mesh=mesh)

    @contextmanager
    def hold() -> Iterator[None]:
        distiller.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            distiller.set_requires_gradient_sync(True)  # type: ignore[operator]

    return Parallel(distiller, hold)


def start_sharded(distiller: Distiller, batch: Batch) -> None:
    """Run a first batch through, which tells FSDP what is called from where."""
    _warm_up(distiller, distiller, batch)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return what stands in a row and has parts of its own, the inner ones first."""
    rows = [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    blocks = [b for row in rows for b in row if any(b.children()) and not _is_row(b)]
    order = {id(module): number for number, module in enumerate(model.modules())}
    unique = {id(block): block for block in blocks if any(True for _ in block.parameters())}
    return sorted(unique.values(), key=lambda block: -order[id(block)])


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)  # which has no forward to gather for


def _warm_up(module: nn.Module, inner: nn.Module, batch: Batch) -> None:
    module.train()
    with buffers_kept(inner):
        for _ in range(2):
            module(batch)[TOTAL].backward()
    inner.zero_grad(set_to_none=True)
