"""The stored outputs of a stage's teacher, with what its notes and its profile tell of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from distill.data.batch import Batch
from distill.model.stored import Outputs, StoredRows
from distill.model.wiring import Timer, Values


@dataclass
class StageOutputs(Outputs):
    """A teacher's outputs in a store, read and written through a clock while steps are timed.

    Attributes:
        role: of the teacher.
        near: how a store that is like this one but not used differs from it, or how what this one
            was made with differs from what it is used for; empty without any.
        read: batches all of which was there.
        timer: called with the kind ``store`` around reading from the disk and writing to it.
    """

    role: str = ""
    near: str = ""
    read: int = 0
    timer: Timer | None = None

    def find(self, batch: Batch, epoch: int = 0, number: int = 0) -> StoredRows:
        """Return what there is for a batch."""
        look = partial(super().find, batch, epoch, number)
        found: StoredRows = look() if self.timer is None else self.timer("store", self.role, look)
        return found

    def values(self, stored: StoredRows) -> Values:
        """Return what is stored for a batch of which nothing is missing."""
        self.read += 1
        return super().values(stored)

    def keep(self, stored: StoredRows, values: Values) -> Values:
        """Put what is missing into the store."""
        put = partial(super().keep, stored, values)
        kept: Values = put() if self.timer is None else self.timer("store", self.role, put)
        return kept
