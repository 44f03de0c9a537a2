"""A stage from its description to the point where it could take its first step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from distill.config.experiment import Stage
from distill.data.plan import Plan
from distill.data.source import Source
from distill.training.rehearsal import Rehearsal, rehearse
from distill.training.seed_run import SeedRun
from distill.training.stage import Assembly, roles_in_force


@dataclass(frozen=True)
class Prepared:
    """A stage that two samples have gone through."""

    assembly: Assembly
    source: Source
    plan: Plan
    rehearsal: Rehearsal


def prepare(run: SeedRun, stage: Stage, stack: ExitStack) -> Prepared:
    """Put a stage together and rehearse it; its roles are in force for as long as ``stack`` lasts.

    Raises:
        ConfigError, DataError: what the file's wishes cannot be fulfilled with.
    """
    source = run.sources[stage.data.train]
    assembly = run.assemble(stage)
    stack.enter_context(roles_in_force(assembly))
    stack.enter_context(run.in_form(stage, [run.models[name] for name in stage.models]))
    plan = run.plan(stage)
    batch = run.first_batch(stage, source, run.place(stage))
    rehearsal = rehearse(run.builder, assembly, source, plan, batch, run.seed)
    return Prepared(assembly, source, plan, rehearsal)
