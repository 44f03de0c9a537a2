"""Commands on data sets: ``distill data pack``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distill.cli_errors import Group
from distill.cli_options import plugin_option, remote_code_option, set_option
from distill.errors import StorageError, UsageError, did_you_mean

if TYPE_CHECKING:
    from distill.data.batch import Sample
    from distill.data.source import Source


@click.group(cls=Group)
def data() -> None:
    """Prepare data sets for training."""


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("dataset")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
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
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
) -> None:
    """Write the images of DATASET, of the experiment FILE, to few files at training size.

    They are packed as they are behind the data set's wrappers and before its transforms. The folder
    is a data set of its own: {type: Packed, params: {root: FOLDER}}.
    """
    from distill.experiment_file import open_experiment
    from distill.training.build import Builder

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
    spec = experiment.datasets[dataset]
    parts = [spec.component, *spec.wrappers]
    made_from = {
        "experiment": str(file),
        "dataset": dataset,
        "parts": [{"type": part.type, "params": dict(part.params)} for part in parts],
    }
    with click.progressbar(length=len(source), label=f"packing {dataset}", file=sys.stderr) as bar:
        try:
            written = packer(_Samples(source), output, made_from, lambda _: bar.update(1))
        except FileExistsError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise StorageError(f"{output} cannot be written: {error}") from error
    sizes = [path.stat().st_size for path in output.iterdir()]
    click.echo(
        f"{len(source):,} samples in {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB; to be read "
        f"with {written}"
    )


class _Samples:
    """The items of a data set as its wrappers give them, their errors told with its name."""

    def __init__(self, source: Source):
        self._source, self.classes = source, source.classes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        return self._source.untransformed(index)
