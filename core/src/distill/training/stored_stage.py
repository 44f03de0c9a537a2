"""Which of a stage's teachers have a store, and which of them need not be loaded.

A teacher is left out of memory if all rows that the stage will ask for are there, if nothing else
of it is needed, and if it has been measured before. Should a row turn out to be damaged, or its
sample another one than it was, the teacher is loaded in the middle of an epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from distill import distributed
from distill.config.experiment import Stage, Teacher
from distill.data.batch import Batch, map_tensors
from distill.data.plan import Plan
from distill.data.reading_samples import Fingerprints
from distill.data.source import Source
from distill.errors import ConfigError, DataError, StorageError
from distill.model.stored import Outputs
from distill.model.wiring import Address
from distill.store.folder import unwritable
from distill.training.around import special_module
from distill.training.build import Builder
from distill.training.fast_teachers import make_fast
from distill.training.measured_before import measured_key
from distill.training.metrics import compares_with
from distill.training.mixed_samples import check_mixing
from distill.training.note import Note
from distill.training.parts import Parts
from distill.training.repeated_inputs import check_repeats
from distill.training.seed_run import SeedRun
from distill.training.stage import Assembly, assemble
from distill.training.stage_outputs import StageOutputs
from distill.training.store_identity import (
    digest,
    identity,
    samples_seen,
    weights_in,
    weights_of,
)
from distill.training.teacher_store import TeacherStore, check_encoding, each_of, names

META = torch.device("meta")
COMPANY = 8
"""So many samples are looked at together and each alone, before a store is made."""


@dataclass(frozen=True)
class Asked:
    """What a stage wants of a teacher: values of its forward, and whether anything else too."""

    addresses: tuple[Address, ...]
    more: bool


def may_stay_unloaded(builder: Builder, name: str) -> bool:
    """Whether a model does nothing in the whole run but to give outputs that may be stored.

    What its weights are has to be known without it: from its checkpoint.
    """
    experiment = builder.experiment
    described = experiment.models.get(name)  # a random teacher has a name of its own
    if described is None or described.checkpoint is None or described.redesign is not None:
        return False
    for stage in experiment.stages:
        if name in stage.trains:
            return False
        if any(t.instance == name and t.store is None for t in stage.teachers.values()):
            return False
    checkpoint = Path(described.checkpoint)
    return checkpoint.suffix == ".safetensors" and checkpoint.is_file()


def find_stores(run: SeedRun, stage: Stage) -> dict[str, TeacherStore]:
    """Return the stores of a stage's teachers by role, whether they are there already or not.

    Raises:
        ConfigError: if what a teacher is given is not the same in every epoch, or is to be kept as
            logits without being any.
        StorageError: if a store is to be made where nothing can be written.
    """
    wanted = [role for role, teacher in stage.teachers.items() if teacher.store is not None]
    if not wanted:
        return {}
    source = run.sources[stage.data.train]
    check_repeats(run.builder, stage, wanted[0], source)
    mixes_by_place = check_mixing(run, stage, wanted[0], source)
    asked = _asked(run.builder, stage)
    for role in wanted:
        check_encoding(run.builder, stage.teachers[role], role, asked[role].addresses)
    stores = {
        role: _store(run, stage, role, asked[role], source, mixes_by_place)
        for role in wanted
        if asked[role].addresses
    }
    is_made = all(store.is_there for store in stores.values())
    refused = distributed.from_main("" if is_made else unwritable(run.builder.stores))
    if refused:
        raise StorageError(refused)
    return stores


def _store(
    run: SeedRun, stage: Stage, role: str, asked: Asked, source: Source, mixes_by_place: bool
) -> TeacherStore:
    teacher = stage.teachers[role]
    weights = _weights(run, teacher)
    model = run.models[teacher.instance]
    processes = distributed.world_size() if mixes_by_place else None
    place = run.seed, run.device.type, processes
    known = identity(run.builder, stage, role, asked.addresses, model, weights, source, *place)
    rows = len(source) * (stage.data.views or 1)
    folder, data = run.builder.stores / digest(known), stage.data.train
    seen = cache(partial(samples_seen, source))
    addresses, more = asked.addresses, asked.more
    return TeacherStore(role, teacher, addresses, more, known, folder, rows, data, seen).found()


def _weights(run: SeedRun, teacher: Teacher) -> str:
    """Return the hash of a teacher's weights, from its checkpoint if it is not loaded."""
    if teacher.instance in run.unloaded:
        checkpoint = run.builder.experiment.models[teacher.model].checkpoint
        assert checkpoint is not None
        try:
            return weights_in(Path(checkpoint))
        except (SafetensorError, OSError):
            run.load(teacher.instance)  # which says what is wrong with it
    return weights_of(run.models[teacher.instance].state_dict())


def _asked(builder: Builder, stage: Stage) -> dict[str, Asked]:
    """Find out what the stage asks of its teachers, from models without memory."""
    with META:
        models = {name: builder.model(name, 0) for name in stage.models}
        assembly = assemble(builder, stage, models, Parts(), 0, META)
    if assembly.faults:
        raise ConfigError(assembly.faults)
    distiller = assembly.distiller
    assert distiller is not None
    distiller.release()
    borrowed = {a.module.owner for a in stage.auxiliary.values() if a.module is not None}
    return {
        role: Asked(
            tuple(distiller.addresses_of(role)),
            role in borrowed or role in distiller.owners_of_tensors(),
        )
        for role in stage.teachers
    }


def absent_teachers(
    run: SeedRun, stage: Stage, stores: Mapping[str, TeacherStore], plan: Plan
) -> dict[str, Outputs]:
    """Load the teachers that the stage needs, and return what is stored of the others, by role."""
    opened: dict[str, Outputs] = {}
    for role, teacher in stage.teachers.items():
        if teacher.instance not in run.unloaded:
            continue
        store = stores.get(role)
        is_enough = store is not None and _is_enough(run, stage, store, plan)
        # One process decides for all, since others may be filling the store meanwhile.
        if store is None or not distributed.from_main(is_enough):
            run.load(teacher.instance)
        else:
            opened[role] = store.open(stage)
    return opened


def _is_enough(run: SeedRun, stage: Stage, store: TeacherStore, plan: Plan) -> bool:
    """Whether a store has all that a stage wants of a teacher."""
    if store.more or not store.is_there:
        return False
    entries = [*stage.metrics]
    test = run.builder.experiment.test
    entries += test.metrics if test is not None else ()
    for entry in entries:
        metric = run.builder.component("metrics", entry.component)
        if compares_with(metric) == store.role:
            return False
    if stage.data.validate and store.measured(measured_key(run, stage)) is None:
        return False
    outputs = store.open(stage)
    try:
        return is_filled(outputs, stage, plan)
    finally:
        outputs.rows.release()


def is_filled(outputs: Outputs, stage: Stage, plan: Plan) -> bool:
    """Whether all rows that the stage's epochs ask for have been written."""
    written = outputs.rows.checks["check"].reshape(plan.size, outputs.views) != 0
    used = sorted(views_used(stage))
    left_out = 0
    if plan.drop_last and plan.sampler is None and plan.batch_sampler is None:
        left_out = plan.samples - plan.batches * plan.batch_size
    return bool((plan.size - written[:, used].sum(0) <= left_out).all())


def views_used(stage: Stage) -> set[int]:
    """Return which of a sample's views come in a stage."""
    data = stage.data
    if data.views is None:
        return {0}
    if data.sampler is not None or data.batch_sampler is not None:
        return set(range(data.views))
    turns = -(-stage.epochs // data.views_at_once)
    return {n % data.views for n in range(turns * data.views_at_once)}


def with_first_rows(batch: Batch, opened: Mapping[str, Outputs], device: torch.device) -> Batch:
    """Give two samples to rehearse with what is stored of teachers that are not there."""
    if not opened:
        return batch
    stored = {role: outputs.first(len(batch)) for role, outputs in opened.items()}
    return replace(batch, stored=replace(batch, stored=stored).to(device).stored)


def put_into_use(
    run: SeedRun, assembly: Assembly, stores: Mapping[str, TeacherStore], batch: Batch
) -> None:
    """Make the stores that are not there, and let the stage's steps read and write all of them.

    Args:
        run: of which the stage is.
        assembly: the stage, rehearsed.
        stores: of its teachers by role.
        batch: two samples as its models are given them.
    """
    distiller = assembly.distiller
    assert distiller is not None
    own = [store.folder.name for store in stores.values()]
    for role, store in stores.items():
        if role in assembly.absent:
            distiller.absent[role] = _late(run, assembly, store, batch)
            continue
        near = ""
        if not distributed.from_main(store.is_there):
            if distributed.is_main():
                near = store.near(own)
                _make(run, assembly, store, batch)
            distributed.barrier()
        distiller.stores[role] = store.open(assembly.stage, near)


def _make(run: SeedRun, assembly: Assembly, store: TeacherStore, batch: Batch) -> None:
    if store.folder.exists():
        print(f"the store {store.folder} is damaged, and begun again", file=sys.stderr, flush=True)
    assert assembly.distiller is not None
    try:
        store.make(assembly.distiller, batch, *_in_company(run, assembly.stage, batch))
    except DataError as error:
        fault = run.builder.experiment.fault((*store.teacher.path, "store"), str(error))
        raise DataError(str(fault)) from error


def _in_company(run: SeedRun, stage: Stage, batch: Batch) -> tuple[Batch, list[Batch]]:
    """Return some samples in one batch, and each of them in one of its own.

    They are put into batches anew, as some collate functions do what depends on all of a batch,
    unless they are mixed with one another.
    """
    if stage.data.batch_transforms:
        return batch, each_of(batch)
    source = run.sources[stage.data.train]
    count = min(COMPANY, stage.data.batch_size, len(source))
    read = partial(run.first_measured, stage, source, batch.index.device)
    return read(size=count), [read(size=1, first=number) for number in range(count)]


def _late(
    run: SeedRun, assembly: Assembly, store: TeacherStore, batch: Batch
) -> Callable[[], None]:
    """Return what loads a teacher in the middle of a stage.

    Args:
        run: of which the stage is.
        assembly: the stage.
        store: of the teacher.
        batch: two samples.
    """
    role = store.role

    def load() -> None:
        stage, distiller = assembly.stage, assembly.distiller
        assert distiller is not None
        teacher = stage.teachers[role]
        if _weights(run, teacher) != store.known["teacher"]["weights"]:
            message = (
                f"the weights of '{teacher.model}' have changed since the stage began, so that "
                "what is stored is not theirs; run again, or put back the checkpoint"
            )
            raise run.builder.experiment.error((*teacher.path, "store"), message)
        model = run.load(teacher.instance).to(run.device).requires_grad_(False).eval()
        if stage.channels_last:
            model.to(memory_format=torch.channels_last)
        special = special_module(run.builder, teacher, model)
        if special is not None:
            assembly.specials[role] = special.eval()
        distiller.adopt(role, model, special)
        make_fast(run, assembly, batch)

    return load


def store_notes(assembly: Assembly) -> Iterator[str]:
    """Tell where the outputs of teachers are stored, what is there, and what is in vain."""
    assert assembly.distiller is not None
    stage = assembly.stage
    for role, outputs in assembly.distiller.stores.items():
        filled, rows = outputs.rows.filled, len(outputs.rows)
        is_full, is_absent = filled == rows, role in assembly.absent
        there = "all" if is_full else f"{filled:,}"
        kept = f"{role}'s outputs are stored in {outputs.rows.folder}"
        late = ", and the model, measured before, is loaded only if a row does not fit"
        unloaded = late if is_absent else ""
        now = partial(getattr, outputs.rows, "filled")
        yield Note(f"{kept}: {there} of {rows:,} are there{unloaded}", "store", kept, now)
        if isinstance(outputs, StageOutputs) and outputs.near:
            yield f"{role}: {outputs.near}"
        yield from _kept_otherwise(role, outputs)
        if not (is_full or outputs.rows.may_be_written):
            yield (
                f"the store of {role} may only be read: what is missing is computed in every epoch "
                "and not kept; --stores DIR names another folder"
            )
        if role in stage.compile and (is_full or is_absent):
            yield f"compile does nothing for {role} in training: it is read from its store"
        if stage.data.on_bad_sample == "skip" and not is_full and not is_absent:
            yield (
                f"on_bad_sample: skip: skipped samples have no row, so with any of them the store "
                f"of {role} is never full and {role} is loaded in every run"
            )


def _kept_otherwise(role: str, outputs: Outputs) -> Iterator[str]:
    """Tell what beside logits in ``top_k`` is kept in another encoding."""
    fields = outputs.form.layout.fields
    others = [field.name for field in fields if field.kept == "float16"]
    if others and any(field.kept == "top_k" for field in fields):
        yield f"encoding top_k is for the logits of {role}; {names(others)}: float16"


def fingerprints_wanted(stage: Stage, stores: Iterable[str]) -> Fingerprints | None:
    """Return of what in each sample fingerprints are to be taken."""
    roles = list(stores)
    if not roles:
        return None
    return "all" if any(stage.teachers[role].special is not None for role in roles) else "inputs"


def with_stored(
    batches: Iterator[Batch], stores: Mapping[str, Outputs], epoch: int, *, pins: bool = False
) -> Iterator[Batch]:
    """Give each batch of an epoch what is stored for it, in page-locked memory if ``pins``."""
    return _looked_up(batches, stores, epoch, pins) if stores else batches


def _looked_up(
    batches: Iterable[Batch], stores: Mapping[str, Outputs], epoch: int, pins: bool
) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        found = {role: out.find(batch, epoch, number) for role, out in stores.items()}
        if pins:
            found = map_tensors(lambda tensor: tensor.pin_memory(), found)
        yield replace(batch, stored=found)
