"""A rehearsed stage with all that its steps need: spread over processes, optimizer, loop, notes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from distill.data.plan import Plan
from distill.data.source import Source
from distill.reference import STUDENT
from distill.training.fast_teachers import compiled_teachers, fast_notes
from distill.training.form import compiled
from distill.training.in_memory import keep_data, memory_notes
from distill.training.loop import Loop
from distill.training.measuring import Measuring
from distill.training.optimizer import build_optimization
from distill.training.prepared import Prepared
from distill.training.profile import StepClock, data_part
from distill.training.seed_run import SeedRun, memory_format
from distill.training.spread import Spread, spread
from distill.training.stage_notes import stage_notes
from distill.training.stored_stage import put_into_use, store_notes
from distill.training.term_gradients import TermProbe, unmeasured


@dataclass(frozen=True)
class Ready:
    """A stage that can take its first step.

    Attributes:
        notes: what a person should know of it.
    """

    spread: Spread
    loop: Loop
    plan: Plan
    source: Source
    measuring: Measuring
    notes: list[str]


def make_ready(run: SeedRun, prepared: Prepared, stack: ExitStack) -> Ready:
    """Bring a stage to its first step; what it takes is given back with ``stack``.

    Raises:
        ConfigError, DataError: what the file's wishes cannot be fulfilled with.
    """
    plan, stage = prepared.plan, prepared.assembly.stage
    source = keep_data(run, stage)
    put_into_use(run, prepared.assembly, prepared.stores, prepared.batch)
    over = spread(run, prepared.assembly, source, prepared.rehearsal, stack)
    of_fast = fast_notes(run, over.assembly, source, plan)  # as they are before torch compiles them
    loop = _loop(run, over, stack)
    notes = [
        *stage_notes(prepared.assembly, plan, prepared.rehearsal),
        *unmeasured(stage, plan, loop.log_every),
        *of_fast,
        *store_notes(over.assembly),
        *memory_notes(run),
    ]
    return Ready(over, loop, plan, source, _measuring(run, prepared, over), notes)


def _loop(run: SeedRun, over: Spread, stack: ExitStack) -> Loop:
    stage, distiller = over.assembly.stage, over.assembly.distiller
    assert distiller is not None
    trained = over.assembly.trained()
    optimization = build_optimization(run.builder, stage, trained, run.device, distiller.criterion)
    models = [over.assembly.roles[role] for role in stage.compile]
    models += compiled_teachers(over.assembly)
    keeps_graph = stage.term_gradients or optimization.split is not None
    stack.enter_context(compiled(models, keeps_graph=keeps_graph))
    log_every = run.builder.experiment.log_every
    return Loop(
        over.parallel.module,
        optimization,
        run.device,
        run.seed,
        stage.name,
        log_every,
        run.mixing(stage),
        memory_format(stage),
        over.parallel.hold,
        TermProbe(distiller, run.device, stage.name) if stage.term_gradients else None,
        StepClock(distiller, run.device, log_every, run.profiles, data_part(stage.data)),
    )


def _measuring(run: SeedRun, prepared: Prepared, over: Spread) -> Measuring:
    assembly, stage = over.assembly, over.assembly.stage
    assert assembly.distiller is not None
    runs = assembly.distiller.extents[STUDENT] != "nothing"
    trains = any(p.requires_grad for p in assembly.roles[STUDENT].parameters())
    peers = {name: assembly.auxiliary[name] for name in stage.measured_peers}
    takes_part = runs or trains
    return Measuring(run, stage, assembly.roles, over.average, takes_part, peers, prepared.stores)
