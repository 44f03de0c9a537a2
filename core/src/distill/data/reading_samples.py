"""Reading samples: each seeded by its place, or another one where it cannot be read."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from distill import randomness
from distill.data.batch import Sample
from distill.data.draw_probe import has_drawn, restart_generators
from distill.data.fingerprint import fingerprint
from distill.data.plan import Key
from distill.data.source import Source
from distill.data.worker_reading import IDLE, Reading
from distill.errors import DataError

EVALUATION = -1
"""The epoch that evaluation draws as."""
LONGEST_GAP = 100
"""So many unreadable samples in a row end a run that skips them."""
TRIED = 2
"""So many samples that were read together are compared with themselves read one by one."""
WAY_OUT = "data: {on_bad_sample: skip} passes over such samples"
DRAWS = "it draws random numbers as it reads; let transforms draw in its place"
CHANGES = "it gives other samples when it is read again; let transforms do what changes"
DIFFERS = "its __getitems__ gives other samples than its __getitem__; let both give the same"
INCOMPARABLE = "its samples cannot be compared; give tensors, arrays, images, numbers or text"
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
        at_one_place: whether all samples begin at one known place of the generators, so that it
            can be told whether one draws.
    """

    seed: int
    epoch: int
    has_views: bool = False
    reads_once: bool = False
    fingerprints: Fingerprints | None = None
    at_one_place: bool = False


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


@dataclass
class SeededSamples(Dataset[Item]):
    """A source whose samples look the same whenever they are read at one place of the run.

    Attributes:
        source: the data.
        how: its samples come to be.
        skips: whether unreadable samples are passed over.
        reading: where it is noted which sample is read.
        latest: the sample whose views are being read, by index.
        ahead: samples of the batch that were read together and have not been used yet, by index.
        alone: why samples are read one by one though the data set has a way to read them together;
            empty for as long as nothing is known.
        failure: why the samples of the last batch could not be read together.
        tried: whether it was seen that they are then the same as one by one.
    """

    source: Source
    how: EpochReading
    skips: bool
    reading: Reading
    latest: dict[int, Sample] = field(default_factory=dict)
    ahead: dict[int, Sample] = field(default_factory=dict)
    alone: str = ""
    failure: str = ""
    tried: bool = False

    def __getitems__(self, keys: list[Key]) -> list[Item]:
        if not self.alone and self.source.reads_together:
            self.read_ahead(keys)
        return [self[key] for key in keys]

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
        else:
            if how.at_one_place:
                restart_generators()
            else:
                randomness.seed_sample(how.seed, how.epoch, index, place)
            raw = self._untransformed(index)
        sample, left = self.source.begun(raw, index)
        taken = None
        if how.fingerprints is not None:
            more = (sample.target, sample.extras) if how.fingerprints == "all" else ()
            taken = fingerprint((sample.input, *more))
        own = view if how.has_views else None
        return Item(sample, "", tuple(skipped), own, taken, left)

    def _raw(self, index: int) -> Sample:
        if index not in self.latest:
            randomness.seed_reading(index)
            raw = self._untransformed(index)
            if not self.how.reads_once:
                return raw
            self.latest.clear()
            self.latest[index] = raw
        return _copied(self.latest[index])

    def _untransformed(self, index: int) -> Sample:
        """Return a sample that nobody else has: one read ahead serves once."""
        if index in self.ahead:
            return self.ahead.pop(index)
        return self.source.untransformed(index)

    def read_ahead(self, keys: list[Key]) -> None:
        """Read the samples of a batch together, unless they are then others or draw.

        One by one each has a place of its own to draw from.
        """
        wanted = list(dict.fromkeys(index for index, _ in keys if index not in self.latest))
        if not wanted:
            return
        restart_generators()
        self.reading.note(wanted[0], len(wanted) - 1)
        self.failure, read = "", {}
        try:
            read = self.source.untransformed_together(wanted)
        except DataError as error:
            self.failure = str(error)
        if has_drawn():
            self.alone = DRAWS
        elif read and not self.tried:
            found = (self._difference(read[index]) for index in wanted[:TRIED])
            self.alone = next(filter(None, found), "")
            self.tried = True
        self.ahead = {} if self.alone else read

    def _difference(self, sample: Sample) -> str:
        """Return why a sample is not the same read by itself, wherever the generators stand."""
        try:
            randomness.seed_reading(sample.index)
            alone = self.source.untransformed(sample.index)
            restart_generators()
            again = self.source.untransformed(sample.index)
        except DataError:
            return DIFFERS
        if has_drawn():
            return DRAWS
        try:
            hashes = [_hash(each) for each in (alone, again, sample)]
        except DataError:
            return INCOMPARABLE
        if hashes[0] != hashes[1]:
            return CHANGES
        return DIFFERS if hashes[1] != hashes[2] else ""


def _hash(sample: Sample) -> int:
    return fingerprint((sample.input, sample.target, sample.extras))


def _copied(sample: Sample) -> Sample:
    """Return a sample whose values a transform may write into."""

    def own(value: Any) -> Any:
        # A tensor by itself: deepcopy would copy all of the memory that it may be a row of.
        if type(value) is torch.Tensor:
            return value.clone()
        # An image of PIL's by its own method, which takes a tenth of the time.
        is_image = type(value).__module__.partition(".")[0] == "PIL"
        return value.copy() if is_image else copy.deepcopy(value)

    return replace(sample, input=own(sample.input), target=own(sample.target))
