"""Reading samples: each seeded by its place, or another one where it cannot be read."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch.utils.data import Dataset

from distill import randomness
from distill.data.batch import Sample
from distill.data.fingerprint import fingerprint
from distill.data.plan import Key
from distill.data.source import Source
from distill.data.worker_reading import IDLE, Reading
from distill.errors import DataError

EVALUATION = -1
"""The epoch that evaluation draws as."""
LONGEST_GAP = 100
"""So many unreadable samples in a row end a run that skips them."""
WAY_OUT = "data: {on_bad_sample: skip} passes over such samples"
Fingerprints = Literal["inputs", "all"]
"""What of a sample a fingerprint is of: its inputs, or targets and extras too."""


@dataclass(frozen=True)
class EpochReading:
    """How the samples of an epoch come to be.

    Attributes:
        seed: of the run.
        epoch: of the stage, from 0, or ``EVALUATION``.
        has_views: whether keys name fixed views of samples.
        reads_once: whether views of one sample that follow one another share its reading.
        fingerprints: of what in each sample a fingerprint is taken, ``None`` for none.
    """

    seed: int
    epoch: int
    has_views: bool = False
    reads_once: bool = False
    fingerprints: Fingerprints | None = None


@dataclass(frozen=True)
class Item:
    """A sample, what stands in for an unreadable one, or the reason why there is none.

    An error is handed on as a value: raised in a worker, it would arrive wrapped in a traceback.

    Attributes:
        sample: what has been read, ``None`` if there is none.
        error: why there is none, unless it is only skipped.
        skipped: index and reason of each sample that could not be read.
        view: which fixed view of the sample it is.
        fingerprint: a hash of what it holds.
        left: transforms that are still to be applied.
    """

    sample: Sample | None
    error: str = ""
    skipped: tuple[tuple[int, str], ...] = ()
    view: int | None = None
    fingerprint: int | None = None
    left: int = 0


@dataclass(frozen=True)
class SeededSamples(Dataset[Item]):
    """A source whose samples look the same whenever they are read at one place of the run.

    Attributes:
        source: the data.
        how: its samples come to be.
        skips: whether unreadable samples are passed over.
        reading: where it is noted which sample is read.
        latest: the sample whose views are being read, by index.
    """

    source: Source
    how: EpochReading
    skips: bool
    reading: Reading
    latest: dict[int, Sample] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> Item:
        skipped: list[tuple[int, str]] = []
        index, repeat = key
        while True:
            self.reading.note(index)
            try:
                return self._item(index, repeat, -1 - key[0] if skipped else repeat, skipped)
            except DataError as error:
                if not self.skips:
                    return Item(None, f"{error}; {WAY_OUT}")
                skipped.append((index, str(error)))
            finally:
                self.reading.note(IDLE)
            if self.how.epoch == EVALUATION:
                return Item(None, skipped=tuple(skipped))
            if len(skipped) == min(LONGEST_GAP, len(self.source)):
                return Item(
                    None, f"{len(skipped)} samples in a row cannot be read: {skipped[-1][1]}"
                )
            index = (index + 1) % len(self.source)

    def _item(self, index: int, view: int, place: int, skipped: list[tuple[int, str]]) -> Item:
        """Read a sample; one that stands in, at a place of its own, is not to look as in its own.

        Of a fixed view there is but one look.
        """
        how = self.how
        if how.has_views:
            raw = self._raw(index)
            randomness.seed_view(index, view)
            sample, left = self.source.begun(raw, index)
        else:
            randomness.seed_sample(how.seed, how.epoch, index, place)
            sample, left = self.source.begun(self.source.untransformed(index), index)
        taken = None
        if how.fingerprints is not None:
            more = (sample.target, sample.extras) if how.fingerprints == "all" else ()
            taken = fingerprint((sample.input, *more))
        own = view if how.has_views else None
        return Item(sample, "", tuple(skipped), own, taken, left)

    def _raw(self, index: int) -> Sample:
        if index not in self.latest:
            randomness.seed_reading(index)
            raw = self.source.untransformed(index)
            if not self.how.reads_once:
                return raw
            self.latest.clear()
            self.latest[index] = raw
        return _copied(self.latest[index])


def _copied(sample: Sample) -> Sample:
    """Return a sample whose values a transform may write into."""

    def own(value: Any) -> Any:
        # An image of PIL's by its own method, which takes a tenth of the time.
        is_image = type(value).__module__.partition(".")[0] == "PIL"
        return value.copy() if is_image else copy.deepcopy(value)

    return replace(sample, input=own(sample.input), target=own(sample.target))
