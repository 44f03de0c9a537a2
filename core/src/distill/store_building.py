"""Teachers' outputs stored ahead of a run: every view of every sample, without a student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic

import torch

from distill import distributed
from distill.beginning import begin, chosen_device, open_sources
from distill.config.experiment import Experiment, Stage
from distill.data.loader import training_batches
from distill.data.plan import Plan
from distill.errors import StorageError, UsageError
from distill.experiment_check import check_to_run
from distill.model.distiller import Distiller
from distill.model.stored import Outputs
from distill.registry import Registry
from distill.store.folder import size_of, size_text
from distill.training.build import Builder
from distill.training.in_memory import keep_data
from distill.training.measuring import Measuring
from distill.training.note import counted
from distill.training.prepared import Prepared, prepare
from distill.training.seed_run import SeedRun, memory_format
from distill.training.stage_outputs import StageOutputs
from distill.training.stored_stage import fingerprints_wanted, put_into_use, with_stored

Say = Callable[[str], None]
TOLD_EVERY = 10.0
"""Seconds between two lines of progress."""
TOLD_FIRST = 2.0
"""Seconds before the first of them."""


def build_stores(
    experiment: Experiment,
    registry: Registry,
    stores: Path,
    say: Say,
    *,
    stage: str | None = None,
    allow_remote_code: bool = False,
) -> None:
    """Fill the store of every teacher of an experiment that has the key ``store``.

    Args:
        experiment: what ``load`` returns.
        registry: what ``plugins`` returns.
        stores: the folder for stores.
        say: is told what is under way, on the main process.
        stage: the only one whose teachers are meant, ``None`` for all.
        allow_remote_code: whether components may fetch code from elsewhere and run it.

    Raises:
        DistillError: with a message for the user.
    """
    stages = _stages(experiment, stage)
    check_to_run(experiment, registry, allow_remote_code=allow_remote_code)
    builder = Builder(experiment, registry, allow_remote_code=allow_remote_code, stores=stores)
    device = chosen_device(experiment)
    distributed.join(device)
    sources = open_sources(builder)
    for one in stages:
        # What is drawn once for all runs depends on a seed only where samples are mixed.
        seeds = experiment.seeds if one.data.batch_transforms else experiment.seeds[:1]
        for seed in seeds:
            run = begin(builder, seed, device, sources)
            _build(run, one, say if distributed.is_main() else _say_nothing)


def _stages(experiment: Experiment, name: str | None) -> list[Stage]:
    """Return the stages to build for.

    Raises:
        ConfigError, UsageError: if nothing is to be stored, or a teacher is trained by the file.
    """
    chosen = [stage for stage in experiment.stages if name in (None, stage.name)]
    if not chosen:
        names = ", ".join(stage.name for stage in experiment.stages)
        raise UsageError(f"there is no stage '{name}' (there are: {names})")
    storing = [s for s in chosen if any(t.store is not None for t in s.teachers.values())]
    if not storing:
        raise UsageError(
            f"{experiment.document.file}: no teacher has the key 'store'; write "
            "teacher: {model: ..., store: true}"
        )
    for stage in storing:
        before = experiment.stages[: experiment.stages.index(stage)]
        for role, teacher in stage.teachers.items():
            for other in before:
                if teacher.model in other.trains:
                    message = (
                        f"'{role}' is trained by stage '{other.name}'; `distill run` stores what "
                        "it gives as it trains. To store it ahead, give its model a "
                        "checkpoint in a file of its own"
                    )
                    raise experiment.error(teacher.path, message)
    return storing


def _build(run: SeedRun, stage: Stage, say: Say) -> None:
    with ExitStack() as stack:
        prepared = prepare(run, stage, stack)
        put_into_use(run, prepared.assembly, prepared.stores, prepared.batch)
        distiller = prepared.assembly.distiller
        assert distiller is not None
        _tell_stores(run, stage, prepared, distiller, say)
        roles = prepared.assembly.roles
        measured = Measuring(run, stage, roles, stores=prepared.stores).teachers()
        for role, numbers in measured.items():
            if numbers:
                say(f"  {role}: {', '.join(f'{name} {n:.4f}' for name, n in numbers.items())}")
        source = keep_data(run, stage)
        views = stage.data.views or 1
        plan = prepared.plan if stage.data.batch_transforms else _all(prepared.plan)
        told = _Progress(say, plan.samples * views)
        for view in range(views):
            _fill(run, stage, replace(prepared, source=source, plan=plan), distiller, view, told)
        distributed.barrier()
        for role, outputs in distiller.stores.items():
            say(f"  {role}: {outputs.rows.filled:,} of {len(outputs.rows):,} rows are there")


def _tell_stores(
    run: SeedRun, stage: Stage, prepared: Prepared, distiller: Distiller, say: Say
) -> None:
    """Say of each store what it will hold, what it takes, and what is there.

    Raises:
        StorageError: if one that is not full may only be read.
    """
    named = f"stage {stage.name}" + (f", seed {run.seed}" if stage.data.batch_transforms else "")
    for role, outputs in distiller.stores.items():
        is_full = outputs.rows.filled == len(outputs.rows)
        if not (is_full or outputs.rows.may_be_written):
            raise StorageError(
                f"{outputs.rows.folder} may only be read; --stores DIR names another folder"
            )
        samples = counted(len(prepared.source), "sample")
        say(f"{named}: {role}: {samples} of {stage.data.train}{_rows_of(stage, outputs)}")
        say(f"  {_there(outputs)}")
        if isinstance(outputs, StageOutputs) and outputs.near:
            say(f"  {outputs.near}")
    measured = stage.data.validate if stage.metrics else ()
    if measured and len(prepared.assembly.absent) < len(stage.teachers):
        say(f"  measuring on {', '.join(measured)} how good the teacher is, which is kept too")


def _rows_of(stage: Stage, outputs: Outputs) -> str:
    """Return how many rows a store has, what they take, and where."""
    rows, folder = len(outputs.rows), outputs.rows.folder
    each = f" x {counted(stage.data.views, 'view')}" if stage.data.views else ""
    return f"{each} = {counted(rows, 'row')}, {size_text(size_of(folder))}, in {folder}"


def _there(outputs: Outputs) -> str:
    """Return how much of a store has been filled before."""
    rows, filled = len(outputs.rows), outputs.rows.filled
    if filled == rows:
        return "all rows are there already; they are compared with the samples"
    if filled == 0:
        return "no row is there yet"
    return f"{filled:,} rows ({100 * filled // rows}%) are there already, {rows - filled:,} to go"


def _fill(
    run: SeedRun,
    stage: Stage,
    prepared: Prepared,
    distiller: Distiller,
    view: int,
    told: _Progress,
) -> None:
    """Store what is missing of the samples of one epoch, which have one view each."""
    mixing = run.mixing(stage)
    batches = training_batches(
        prepared.source,
        prepared.plan,
        run.loading(stage),
        seed=run.seed,
        epoch=view,
        lead=mixing.lead if mixing is not None else 0,
        fingerprints=fingerprints_wanted(stage, distiller.stores),
    )
    with torch.no_grad():
        for number, batch in enumerate(with_stored(batches, distiller.stores, view)):
            if any(stored.missing is not None for stored in batch.stored.values()):
                placed = batch.to(run.device, memory_format=memory_format(stage))
                if mixing is not None:
                    placed = mixing(placed, view, number, run.device)
                distiller.fill_stores(placed)
            told.add(sum(batch.sizes))
    distiller.flush_stores()


def _all(plan: Plan) -> Plan:
    """Return a plan in which every sample comes."""
    return replace(plan, drop_last=False, sampler=None, batch_sampler=None, accumulate=1)


class _Progress:
    """Tells how far a build is, in lines of their own at regular intervals.

    Speed and time left are those of the last interval: rows that are there already, which come
    first, are read faster than others are computed.
    """

    def __init__(self, say: Say, rows: int):
        self._say, self._rows = say, rows
        self._done = self._done_before = 0
        self._told = monotonic()
        self._next = self._told + TOLD_FIRST

    def add(self, rows: int) -> None:
        """Count rows that have been read or computed."""
        self._done += rows
        now = monotonic()
        if now >= self._next:
            self._tell(now)

    def _tell(self, now: float) -> None:
        speed = (self._done - self._done_before) / max(now - self._told, 1e-9)
        left = _duration((self._rows - self._done) / max(speed, 1e-9))
        self._say(
            f"  {self._done:,} of {self._rows:,} rows ({100 * self._done // self._rows}%), "
            f"{speed:,.0f} rows/s, {left} left"
        )
        self._told, self._next, self._done_before = now, now + TOLD_EVERY, self._done


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _say_nothing(text: str) -> None:
    """Leave it to the main process."""
