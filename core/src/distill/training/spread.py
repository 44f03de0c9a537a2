"""A stage's modules over the processes: alike on each (DDP), or a part on each (FSDP)."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import nn

from distill.data.source import Source
from distill.training import sharding
from distill.training.average import Average
from distill.training.freezing import freeze
from distill.training.parallel import Parallel, averaged_over_ranks, shard, start_sharded
from distill.training.rehearsal import Rehearsal
from distill.training.seed_run import SeedRun
from distill.training.sharding import is_sharded
from distill.training.stage import Assembly, assemble, roles_in_force
from distill.training.stored_stage import with_first_rows
from distill.training.sync_batchnorm import synchronized


@dataclass(frozen=True)
class Spread:
    """What trains, and how its weights come back.

    Attributes:
        assembly: of the modules that train.
        parallel: the distiller to call.
        average: of the student, or ``None``.
        copies: of the run's modules, where it is copies that train: (the run's, the copy).
    """

    assembly: Assembly
    parallel: Parallel
    average: Average | None
    copies: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)

    def sync(self) -> None:
        """Bring the run's modules up to what has been trained; every process must ask for it."""
        for original, working in self.copies:
            original.load_state_dict(sharding.whole(working.state_dict()))

    def load(self, working: nn.Module, original: nn.Module) -> None:
        """Bring a module that trains to the weights of the run's own."""
        if working is not original:
            sharding.load(working, original.state_dict())


def spread(
    run: SeedRun, plain: Assembly, source: Source, rehearsal: Rehearsal, stack: ExitStack
) -> Spread:
    """Spread a stage over the processes for as long as ``stack`` lasts.

    Sharded parameters never become whole ones again, so copies of the modules are sharded; the
    run's own stay on the CPU and are brought up to date for every checkpoint.
    """
    stage = plain.stage
    student = run.models[stage.student.model]
    average = run.average(stage, student)
    if is_sharded(stage):
        return _sharded(run, plain, average, source, stack)
    assert plain.distiller is not None
    if stage.sync_batchnorm:
        stack.enter_context(synchronized([plain.distiller]))
    opened = {role: plain.distiller.stores[role] for role in plain.absent}
    batch = with_first_rows(run.first_batch(stage, source, run.device), opened, run.device)
    parallel = averaged_over_ranks(plain.distiller, batch, leaves_unused=rehearsal.unused)
    return Spread(plain, parallel, average)


def _sharded(
    run: SeedRun, plain: Assembly, average: Average | None, source: Source, stack: ExitStack
) -> Spread:
    stage = plain.stage
    assert plain.distiller is not None
    cloned = {role: capture.cloned for role, capture in plain.distiller.captures.items()}
    plain.distiller.release()  # so that its hooks are not copied
    # In an order that is the same in every process, since they exchange weights one by one.
    models = {name: copy.deepcopy(run.models[name]) for name in stage.models}
    parts = run.parts.copied()
    assembly = assemble(run.builder, stage, models, parts, run.seed, run.device)
    distiller = assembly.distiller
    assert distiller is not None
    for role, paths in cloned.items():
        distiller.captures[role].cloned.update(paths)
    stack.enter_context(roles_in_force(assembly))
    freeze(run.builder, assembly)
    if stage.sync_batchnorm:
        stack.enter_context(synchronized([distiller]))
    parallel = shard(distiller, run.device, [average.model] if average is not None else [])
    start_sharded(distiller, run.first_batch(stage, source, run.device))
    copies = [(run.models[name], models[name]) for name in models if name in run.trained]
    copies += [(run.parts.modules[key], part) for key, part in parts.modules.items()]
    return Spread(assembly, parallel, average, copies)
