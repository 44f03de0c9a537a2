"""What a person should know of how data sets are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from distill import randomness
from distill.data.reading_samples import EVALUATION, TRIED, EpochReading, SeededSamples
from distill.data.source import Source
from distill.data.worker_reading import Reading
from distill.errors import DataError


def reading_notes(sources: Iterable[Source]) -> Iterator[str]:
    """Tell which data sets have a ``__getitems__`` that is not used, or fails, and why.

    The first samples are read in this process, since loader workers tell of nothing but samples.
    """
    for source in sources:
        with randomness.seeded(0, "together"):
            note = _note(source) if source.reads_together else ""
        if note:
            yield f"data set '{source.name}': {note}"


def _note(source: Source) -> str:
    samples = SeededSamples(source, EpochReading(0, EVALUATION), True, Reading(0))
    first = range(min(TRIED, len(source)))
    samples.read_ahead([(index, 0) for index in first])
    if samples.alone:
        return f"it is not read a batch at once: {samples.alone}"
    if not samples.failure:
        return ""
    try:
        for index in first:
            source.untransformed(index)
    except DataError:  # bad samples, of which the run tells
        return ""
    failure = samples.failure.partition("\n")[0]
    return f"its __getitems__ fails on the first samples ({failure}); mend it or take it out"
