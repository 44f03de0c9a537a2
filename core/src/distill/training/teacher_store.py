"""The store of one teacher: made in the form of what it gives, opened, noted in."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config.experiment import Stage, Teacher
from distill.data.batch import Batch
from distill.errors import DataError, StorageError
from distill.model.distiller import Distiller
from distill.model.stored import Form, form_of
from distill.model.wiring import Address
from distill.observer import Numbers
from distill.store import rows as files
from distill.store.moved import SEEN, Place, find_moved
from distill.store.near import SHOWN, moved_text, nearest, parts
from distill.training.build import Builder
from distill.training.stage_outputs import StageOutputs

MEASURED = "measured.json"
NO_LOGITS = (
    "encoding top_k is for logits, which are a teacher's output as it is, and the stage reads only "
    "{} of it, which would be kept in float16; write encoding: float16"
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

    def make(self, distiller: Distiller, batch: Batch, alone: Batch) -> None:
        """Make an empty store in the form of what the teacher gives for a few samples.

        Args:
            distiller: of the stage.
            batch: of the samples.
            alone: of the first of them by itself.

        Raises:
            DataError: if that cannot be stored.
            StorageError: if there is no room.
        """
        samples = len(batch)
        values = _given(distiller, self.role, batch)
        assert self.teacher.store is not None
        form = form_of(values, self.addresses, self.role, samples, self.teacher.store)
        self._check_encoding(form)
        self._check_alone(distiller, alone, form, values, samples)
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
        self,
        distiller: Distiller,
        batch: Batch,
        form: Form,
        together: dict[str, Any],
        samples: int,
    ) -> None:
        """Refuse a teacher whose outputs for a sample depend on the others of its batch."""
        if samples < 2:
            return
        try:
            alone = _given(distiller, self.role, batch)
            of_one = form.tensors(alone)
        except Exception:  # foreign code that wants more than one sample tells nothing
            return
        for name, tensor in form.tensors(together).items():
            each = len(tensor) // samples
            one, same = of_one[name].float(), tensor[:each].float()
            is_alike = one.shape == same.shape
            limit = ALIKE * float(same.abs().max()) if is_alike and same.numel() else 0.0
            if not is_alike or (same.numel() and float((one - same).abs().max()) > limit):
                raise DataError(
                    f"what the teacher gives as '{name}' for a sample depends on the other samples "
                    "of the batch, so that it cannot be stored"
                )

    def measured(self, key: str) -> Numbers | None:
        """Return what the teacher was measured as before, ``None`` if it was not."""
        try:
            found: Any = json.loads((self.folder / MEASURED).read_text())
            return {str(name): float(value) for name, value in found[key].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def note_measured(self, key: str, numbers: Numbers) -> None:
        """Keep what the teacher was measured as, unless the store may only be read."""
        file = self.folder / MEASURED
        try:
            known = json.loads(file.read_text())
        except (OSError, ValueError):
            known = {}
        temporary = file.with_name(f".{MEASURED}.{random.getrandbits(32):x}")
        try:
            temporary.write_text(json.dumps({**known, key: dict(numbers)}))
            temporary.replace(file)
        except OSError:  # as rows are not written there either, which is told
            return


def check_encoding(builder: Builder, teacher: Teacher, role: str, asked: Sequence[Address]) -> None:
    """Refuse ``top_k`` where something is asked of a teacher, and no logits.

    Raises:
        ConfigError: saying what is asked.
    """
    if teacher.store is None or teacher.store.encoding != "top_k" or not asked:
        return
    if not any(address.value == role and not address.keys for address in asked):
        path = (*teacher.path, "store", "encoding")
        text = NO_LOGITS.format(names(address.text for address in asked))
        raise builder.experiment.error(path, text)


def names(values: Iterable[str]) -> str:
    """Return what is read of a teacher, in quotes."""
    return ", ".join(f"'{value}'" for value in values)


def _given(distiller: Distiller, role: str, batch: Batch) -> dict[str, Any]:
    """Return what a teacher gives for a batch."""
    return distiller.values_of_teacher(role, replace(batch, stored={}))


def first_of(batch: Batch) -> Batch:
    """Return a batch of the first sample alone."""
    each = len(batch)

    def first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: len(tensor) // each] if tensor.dim() else tensor

    return batch.map(first)
