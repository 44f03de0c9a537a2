"""Commands on data sets: ``distill data pack``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import xxhash

from distill.cli_errors import RESUMABLE, Group
from distill.cli_options import plugin_option, remote_code_option, set_option
from distill.errors import DataError, StorageError, UsageError, did_you_mean

if TYPE_CHECKING:
    from distill.data.batch import Sample
    from distill.data.source import Source

SHOWN = 20
"""So many bad samples are named."""
FILE_LISTS = ("samples", "images", "files")
"""What data sets call the list of their files."""


@click.group(cls=Group)
def data() -> None:
    """Prepare data sets for training."""


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("dataset")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write: a new, empty or half-packed one, in which packing goes on.",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Of the shorter side, to which larger images are made smaller.",
)
@click.option(
    "--format",
    "encoding",
    default="jpeg",
    show_default=True,
    help="jpeg, or raw: ten times the room, and nothing to decode.",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of JPEGs."
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that read and encode.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="Leave out damaged samples; a file that the disk does not give always ends packing.",
)
@set_option
@plugin_option
@remote_code_option
def pack(
    file: Path,
    dataset: str,
    output: Path,
    size: int,
    encoding: str,
    quality: int,
    workers: int,
    skip_bad: bool,
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
) -> None:
    """Write the images of DATASET, of the experiment FILE, to few files at training size.

    They are packed as they are behind the data set's wrappers and before its transforms. The folder
    is a data set of its own: {type: Packed, params: {root: FOLDER}}.

    A sample that is no image ends packing at once; if it is the first, no folder is left.

    Samples that cannot be read are named after the last one. They are an error, and the folder is
    left half-packed; with --skip-bad they are left out, and the others keep their order. A file
    that the file system does not give (missing, no permission, a disk or mount that is lost) ends
    packing at once, with --skip-bad too.

    A folder with something in it, such as a packed data set, is refused. One that is half-packed,
    since packing was stopped or failed, is never read; the same command goes on in it from the last
    whole image, and refuses it where files, labels, settings or code are others.
    """
    from distill.experiment_file import open_experiment
    from distill.training.build import Builder
    from distill.training.code_identity import code_of, made_by

    experiment, registry = open_experiment(file, overrides, plugin_files)
    if dataset not in experiment.datasets:
        known = list(experiment.datasets)
        hint = did_you_mean(dataset, known) or f" (there are: {', '.join(known)})"
        raise UsageError(f"there is no data set '{dataset}' in {file}{hint}")
    formats = [entry.name for entry in registry.entries("packers")]
    if encoding not in formats:
        raise UsageError(f"--format {encoding}: write one of {', '.join(formats) or 'none'}")
    packer = registry.create("packers", encoding, size=size, quality=quality, workers=workers)
    source = Builder(experiment, registry, allow_remote_code=allow_remote_code).source(dataset)
    untransformed = replace(source, transforms=(), joint_transforms=(), batched=())
    spec = experiment.datasets[dataset]
    parts = [spec.component, *spec.wrappers]
    made_from = {
        "experiment": str(file),
        "dataset": dataset,
        "parts": [{"type": part.type, "params": dict(part.params)} for part in parts],
        "lists": _hash_of_lists(source.dataset),
        "code": code_of(made_by(untransformed)),
    }
    _pack(packer, source, output, made_from, skip_bad)


def _pack(
    packer: Any, source: Source, output: Path, made_from: Mapping[str, Any], skip_bad: bool
) -> None:
    bad: dict[int, str] = {}

    def on_bad(found: Mapping[int, str]) -> None:
        bad.update(found)
        if not skip_bad or len(bad) == len(source):
            raise DataError(_refusal(bad, len(source)))

    try:
        with (
            _kept_to_itself(output),
            click.progressbar(
                length=len(source), label=f"packing {source.name}", file=sys.stderr
            ) as bar,
        ):

            def progress(done: int) -> None:
                if bar.pos == 0 and done > 1:
                    kept = f"{done:,} of {len(source):,} samples have been read already"
                    click.echo(f"\ngoing on: {kept}", err=True)
                bar.update(done - bar.pos)

            written = packer(_Samples(source), output, made_from, progress, on_bad)
    except FileExistsError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error}") from error
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on from here", err=True)
        sys.exit(RESUMABLE)
    if bad:
        click.echo(f"{_counted(bad)} skipped:\n{_listed(bad)}", err=True)
    sizes = [path.stat().st_size for path in output.iterdir()]
    click.echo(
        f"{len(source) - len(bad):,} samples in {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB"
        f"{f'; {_counted(bad)} skipped' if bad else ''}; to be read with {written}"
    )


@contextmanager
def _kept_to_itself(output: Path) -> Iterator[None]:
    """Keep other processes from packing to the same folder, by a file beside it."""
    import filelock

    folder = output.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        with lock.acquire(timeout=0):
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except filelock.Timeout:
        raise StorageError(f"another process is packing to {output}") from None


def _refusal(bad: Mapping[int, str], samples: int) -> str:
    which = f"{_counted(bad)} of {samples:,} cannot be packed; --skip-bad leaves bad samples out"
    if len(bad) == samples:
        which = f"none of {samples:,} samples can be packed"
    return f"{which}\n{_listed(bad)}"


def _listed(bad: Mapping[int, str]) -> str:
    """Return a line for each of the first samples, which names it, and how many more there are."""
    lines = [f"  {reason}" for reason in list(bad.values())[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN:,} more")
    return "\n".join(lines)


def _counted(bad: Mapping[int, str]) -> str:
    return f"{len(bad):,} sample{'s' * (len(bad) != 1)}"


class _Samples:
    """The items of a data set as its wrappers give them, their errors told with name and file."""

    def __init__(self, source: Source):
        self._source, self.classes = source, source.classes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        try:
            return self._source.untransformed(index)
        except DataError as error:
            file = _file(self._source.dataset, index)
            if file is None or file in str(error):
                raise
            raise DataError(f"{error} ({file})") from error


def _file(dataset: Any, index: int) -> str | None:
    """Return the file of a sample, where its data set lists them as torchvision's do."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return _file(dataset.dataset, int(dataset.indices[index]))
    for name in FILE_LISTS:
        listed = getattr(dataset, name, None)
        if isinstance(listed, (list, tuple)) and len(listed) == len(dataset):
            entry = listed[index]
            file = entry[0] if isinstance(entry, (list, tuple)) and entry else entry
            if isinstance(file, (str, Path)):
                return str(file)
    return None


def _hash_of_lists(dataset: Any) -> str:
    """Return a hash of the files and the labels of a data set, where it lists them."""
    from distill.data.labels import labels

    digest = xxhash.xxh3_64()
    for index in range(len(dataset)):
        digest.update(f"{_file(dataset, index)}\n".encode(errors="surrogateescape"))
    with suppress(DataError):
        digest.update(repr(labels(dataset, read=False)).encode())
    return digest.hexdigest()
