"""Data that a stage keeps in memory: when it is read, and what a person should know of it."""

from __future__ import annotations

from collections.abc import Iterator

from distill import distributed
from distill.config.experiment import Stage
from distill.data.keepable import NotKeepable, Split, split
from distill.data.keeping import keep
from distill.data.kept import OneByOne
from distill.data.source import Source
from distill.errors import ConfigError
from distill.training.note import Note, counted
from distill.training.seed_run import SeedRun


def check_keepable(run: SeedRun, stage: Stage) -> None:
    """Look at a few samples of the data that a stage wants in memory, reading no more.

    Raises:
        ConfigError: if they cannot be kept.
        DataError: if none of them can be read.
    """
    for name in _wanted(stage):
        _split(run, stage, run.sources[name])


def keep_data(run: SeedRun, stage: Stage) -> Source:
    """Read the data that a stage wants in memory, and let go of what it does not want.

    Returns:
        Its training data, in memory or not.

    Raises:
        ConfigError: if they cannot be kept, or there is not enough memory.
        DataError: if they cannot be read.
    """
    wanted = _wanted(stage)
    run.kept = {name: kept for name, kept in run.kept.items() if name in wanted}
    for name in wanted:
        if name not in run.kept:
            source = run.sources[name]
            chosen = _split(run, stage, source)
            try:
                run.kept[name] = keep(source, chosen, run.loading(stage), run.device)
            except NotKeepable as error:
                raise _refusal(run, stage, error) from error
    return run.data(stage.data.train)


def memory_notes(run: SeedRun) -> Iterator[str]:
    """Tell what is in memory, and how batches of it come to be."""
    for kept in run.kept.values():
        applied = f", after {', '.join(kept.before)}" if kept.before else ""
        each = distributed.world_size()
        copies = f" by each of the {each} processes" if each > 1 else ""
        # How much that is has been told before it was taken.
        yield Note(
            f"the {counted(len(kept), 'sample')} of data set '{kept.name}' "
            f"{'is' if len(kept) == 1 else 'are'} kept in memory on {kept.device}{copies}{applied}",
            "memory",
        )
        for step in kept.steps:
            how = "sample by sample" if isinstance(step, OneByOne) else "to whole batches"
            are = "is" if len(step.names) == 1 else "are"
            yield f"of data set '{kept.name}', {', '.join(step.names)} {are} applied {how}"
        if kept.bad:
            bad = counted(len(kept.bad), "sample")
            yield f"{bad} of data set '{kept.name}' cannot be read"


def _wanted(stage: Stage) -> list[str]:
    return list(dict.fromkeys((stage.data.train, *stage.data.validate))) * stage.data.in_memory


def _split(run: SeedRun, stage: Stage, source: Source) -> Split:
    try:
        return split(source)
    except NotKeepable as error:
        raise _refusal(run, stage, error) from error


def _refusal(run: SeedRun, stage: Stage, error: NotKeepable) -> ConfigError:
    place = stage.places.get("data.in_memory", (*stage.data.path, "in_memory"))
    return run.builder.experiment.error(place, str(error))
