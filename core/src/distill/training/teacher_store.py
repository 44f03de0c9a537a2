"""The store of one teacher: made in the form of what it gives, opened, noted in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config.experiment import Stage, Teacher
from distill.data.batch import Batch
from distill.errors import DataError, StorageError
from distill.model.distiller import Distiller
from distill.model.stored import Form, form_of
from distill.model.wiring import Address, Call
from distill.observer import Numbers
from distill.store import rows as files
from distill.store.measured import find_measured, note_measured
from distill.store.moved import SEEN, Place, find_moved
from distill.store.near import SHOWN, moved_text, nearest, parts
from distill.training.build import Builder
from distill.training.stage_outputs import StageOutputs

NO_LOGITS = (
    "encoding top_k is for logits, which are a teacher's output as it is, and the stage reads only "
    "{} of it, which would be kept in float16; write encoding: float16"
)
OTHER_TEMPERATURE = (
    "encoding top_k keeps the mass of the other classes at temperature {}, but a loss takes it at "
    "another: {}; write {}encoding: float16"
)
ALIKE = 1e-2
"""How much a sample's outputs may depend on its neighbours, relative to the largest of them."""


@dataclass(frozen=True)
class TeacherStore:
    """The store of one teacher of a stage, which may not be there yet.

    Attributes:
        addresses: what the stage reads of the teacher.
        more: whether it asks for the teacher's parameters or modules too.
        known: what the outputs depend on.
        folder: of the store.
        rows: it will have.
        data: name of the data set, for people.
        seen: returns fingerprints of some samples, by which a data set is known in another place.
        moved: from where to where the data have been moved since the store was made.
    """

    role: str
    teacher: Teacher
    addresses: tuple[Address, ...]
    more: bool
    known: Mapping[str, Any]
    folder: Path
    rows: int
    data: str = ""
    seen: Callable[[], Sequence[int]] = tuple
    moved: Sequence[Place] = ()

    @property
    def is_there(self) -> bool:
        """Whether the store has been made."""
        return files.is_sound(self.folder)

    def found(self) -> TeacherStore:
        """Return the store itself, or in its place one that was made for the same data elsewhere.

        All processes have to call it: the main one decides.
        """
        there = self if self.is_there else self._elsewhere() if distributed.is_main() else self
        folder, moved = distributed.from_main((there.folder, there.moved))
        return replace(self, folder=folder, moved=moved)

    def _elsewhere(self) -> TeacherStore:
        found = find_moved(self.folder.parent, self.known, self.seen)
        return self if found is None else replace(self, folder=found[0], moved=found[1])

    def near(self, leave: Iterable[str]) -> str:
        """Say what the store most like this one was made with; ``leave`` are not to be told of."""
        teacher = self.teacher.model
        return nearest(self.folder.parent, self.known, teacher, frozenset(leave), self.seen())

    def open(self, stage: Stage, near: str = "") -> StageOutputs:
        """Open the store.

        Args:
            stage: in which the teacher teaches.
            near: what is to be said of another store that is not used; of this one it is told if
                the data have been moved.

        Raises:
            StorageError: if it is damaged beyond use.
        """
        rows = files.open_rows(self.folder)
        if len(rows) != self.rows:
            raise StorageError(f"{self.folder} has {len(rows):,} rows instead of {self.rows:,}")
        form = Form.of_plain(rows.meta["form"])
        views = stage.data.views or 1
        mixed = len(stage.data.batch_transforms)
        if self.moved:
            name = self.folder.name[:SHOWN]
            near = f"store {name} is used: it was made with {moved_text(self.moved)}"
        return StageOutputs(rows, form, views, mixed, role=self.role, near=near)

    def make(
        self, distiller: Distiller, batch: Batch, together: Batch, alone: Sequence[Batch]
    ) -> None:
        """Make an empty store in the form of what the teacher gives for a few samples.

        Args:
            distiller: of the stage.
            batch: two samples.
            together: some samples.
            alone: each of these by itself.

        Raises:
            DataError: if that cannot be stored.
            StorageError: if there is no room.
        """
        samples = len(batch)
        values = _given(distiller, self.role, batch)
        assert self.teacher.store is not None
        form = form_of(values, self.addresses, self.role, samples, self.teacher.store)
        self._check_encoding(form)
        self._check_alone(distiller, form, together, alone)
        about = {"teacher": self.teacher.model, "data": self.data}
        known = {"identity": self.known, "parts": parts(self.known)}
        meta = {**known, "about": about, "form": form.plain(), SEEN: list(self.seen())}
        files.create(self.folder, meta, self.rows, form.layout.width)

    def _check_encoding(self, form: Form) -> None:
        """Refuse ``top_k`` where there are no logits to keep so."""
        assert self.teacher.store is not None
        kept = {field.kept for field in form.layout.fields}
        if self.teacher.store.encoding == "top_k" and "top_k" not in kept:
            raise DataError(NO_LOGITS.format(names(field.name for field in form.layout.fields)))

    def _check_alone(
        self, distiller: Distiller, form: Form, together: Batch, alone: Sequence[Batch]
    ) -> None:
        """Refuse a teacher whose outputs for a sample depend on the others of its batch."""
        if len(alone) < 2:
            return
        try:
            of_all = form.tensors(_given(distiller, self.role, together))
            of_each = [form.tensors(_given(distiller, self.role, one)) for one in alone]
        except Exception:  # foreign code that wants more than one sample tells nothing
            return
        for name, tensor in of_all.items():
            rows = tensor.chunk(len(alone))
            same = map(_are_alike, (one[name] for one in of_each), rows)
            if len(rows) != len(alone) or not all(same):
                raise DataError(
                    f"what the teacher gives as '{name}' for a sample depends on the other samples "
                    "of the batch, so that it cannot be stored"
                )

    def measured(self, key: str) -> Numbers | None:
        """Return what the teacher was measured as before, ``None`` if it was not."""
        return find_measured(self.folder, key)

    def note_measured(self, key: str, numbers: Numbers) -> None:
        """Keep what the teacher was measured as, unless the store may only be read."""
        note_measured(self.folder, key, numbers)


def check_encoding(builder: Builder, teacher: Teacher, role: str, asked: Sequence[Address]) -> None:
    """Refuse ``top_k`` where something is asked of a teacher, and no logits.

    Raises:
        ConfigError: saying what is asked.
    """
    if teacher.store is None or teacher.store.encoding != "top_k" or not asked:
        return
    if not _has_output(asked, role):
        path = (*teacher.path, "store", "encoding")
        text = NO_LOGITS.format(names(address.text for address in asked))
        raise builder.experiment.error(path, text)


def check_temperature(
    builder: Builder, teacher: Teacher, role: str, losses: Iterable[Call]
) -> None:
    """Refuse ``top_k`` at another temperature than that of a loss which takes the logits.

    Looked at are numbers that losses have as ``temperature``.

    Raises:
        ConfigError: saying both temperatures.
    """
    store, experiment, place = teacher.store, builder.experiment, (*teacher.path, "store")
    is_known = not experiment.gaps.explain(place, "temperature")
    if store is None or store.encoding != "top_k" or not is_known:
        return
    taking = [call for call in losses if _has_output(call.addresses(), role)]
    found: dict[str, Any] = {c.name: getattr(c.module, "temperature", None) for c in taking}
    asked = {name: value for name, value in found.items() if type(value) in (int, float)}
    wanted = set(asked.values())
    if wanted <= {store.temperature}:
        return
    written = experiment.document.locations
    top = f"top: {store.top}, " if (*place, "top") in written else ""
    fitting = f"store: {{encoding: top_k, {top}temperature: {min(wanted)}}}, or "
    text = OTHER_TEMPERATURE.format(
        store.temperature,
        ", ".join(f"'{name}' at {value}" for name, value in asked.items()),
        fitting if len(wanted) == 1 else "",
    )
    key = "temperature" if (*place, "temperature") in written else "encoding"
    raise experiment.error((*place, key), text)


def _has_output(addresses: Iterable[Address], role: str) -> bool:
    """Whether a teacher's output as it is is among what is read."""
    return any(address.value == role and not address.keys for address in addresses)


def names(values: Iterable[str]) -> str:
    """Return what is read of a teacher, in quotes."""
    return ", ".join(f"'{value}'" for value in values)


def _given(distiller: Distiller, role: str, batch: Batch) -> dict[str, Any]:
    """Return what a teacher gives for a batch."""
    return distiller.values_of_teacher(role, replace(batch, stored={}))


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    # What is the same need not be finite, as logits of classes that are left out.
    is_same = (one == other) | (one.isnan() & other.isnan())
    largest = other[other.isfinite()].abs().max() if other.isfinite().any() else 0.0
    apart = (one - other)[~is_same].abs()  # infinite or NaN where one of both is
    return not apart.numel() or float(apart.max()) <= ALIKE * float(largest)


def each_of(batch: Batch) -> list[Batch]:
    """Return batches of a sample each."""
    samples = len(batch)

    def single(number: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(samples)[number] if tensor.dim() else tensor

    return [batch.map(partial(single, number)) for number in range(samples)]
