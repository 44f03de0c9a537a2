"""A stage from its description to the point where it could take its first step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from distill.config.experiment import Stage
from distill.data.batch import Batch
from distill.data.plan import Plan
from distill.data.source import Source
from distill.training.fast_teachers import make_fast
from distill.training.in_memory import check_keepable
from distill.training.rehearsal import Rehearsal, rehearse
from distill.training.seed_run import SeedRun
from distill.training.stage import Assembly, roles_in_force
from distill.training.stored_stage import absent_teachers, find_stores, with_first_rows
from distill.training.teacher_store import TeacherStore


@dataclass(frozen=True)
class Prepared:
    """A stage that two samples have gone through."""

    assembly: Assembly
    source: Source
    plan: Plan
    rehearsal: Rehearsal
    batch: Batch
    stores: Mapping[str, TeacherStore]


def prepare(run: SeedRun, stage: Stage, stack: ExitStack) -> Prepared:
    """Put a stage together and rehearse it; its roles are in force for as long as ``stack`` lasts.

    Raises:
        ConfigError, DataError: what the file's wishes cannot be fulfilled with.
    """
    source = run.sources[stage.data.train]
    check_keepable(run, stage)
    plan = run.plan(stage)
    stores = find_stores(run, stage)
    opened = absent_teachers(run, stage, stores, plan)
    assembly = run.assemble(stage, opened)
    assert assembly.distiller is not None
    assembly.distiller.stores.update(opened)
    stack.enter_context(roles_in_force(assembly))
    stack.enter_context(run.in_form(stage, run.present(stage)))
    device = run.place(stage)
    batch = with_first_rows(run.first_batch(stage, source, device), opened, device)
    make_fast(run, assembly, batch)
    rehearsal = rehearse(run.builder, assembly, source, plan, batch, run.seed)
    return Prepared(assembly, source, plan, rehearsal, batch, stores)
