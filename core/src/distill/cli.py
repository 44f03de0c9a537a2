"""The command ``distill``. Commands import what needs torch themselves, so that help is quick."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from distill.cli_data import data
from distill.cli_errors import GOES_ON, Group, told_if_ended
from distill.cli_options import plugin_option, remote_code_option, set_option, stores_option
from distill.cli_plugins import cat, cp, ls, plugins
from distill.cli_quick import quick
from distill.cli_store import store
from distill.config.controlled import ALL
from distill.config.experiment import CONTROLS
from distill.errors import UsageError

EXIT_CODES = (
    "Exit codes: 0 done, 2 wrong command or file, 3 plugin, 4 training left the numbers, 5 data, "
    "6 storage, 70 bug or out of memory; 75 stopped, 143 ended by SIGTERM: the same command goes "
    "on."
)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Group, context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(package_name="distill-core", prog_name="distill")
def main() -> None:
    """Distil knowledge from a teacher network into a student.

    One YAML file is one experiment: data, models, stages, losses. Try `distill check exp.yaml`,
    then `distill run exp.yaml`.
    """


for command in (plugins, ls, cat, cp, data, store):
    main.add_command(command)


@main.command(epilog=EXIT_CODES)
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@plugin_option
@remote_code_option
@click.option(
    "--scale-lr",
    type=click.IntRange(min=1),
    metavar="SAMPLES",
    help="Linear scaling rule: multiply every learning rate by a stage's samples a step "
    "(batch_size x accumulate) over SAMPLES, the number that the file's rates are meant for.",
)
@click.option(
    "--control",
    "controls",
    multiple=True,
    type=click.Choice([*CONTROLS, ALL]),
    help="Run it again with this in the teachers' place and compare: is the gain their knowledge? "
    "May be given several times.",
)
@click.option("--runs", default="runs", show_default=True, help="Folder the run's folder goes to.")
@stores_option
@click.option(
    "--profile",
    is_flag=True,
    help="Time every part of every step, print where the time goes after each stage and put it "
    "into report.md. On a GPU each part then waits for it, which makes steps slower.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Train on this machine with several processes (one a GPU, or CPUs). Under torchrun: "
    "torchrun --nproc-per-node N -m distill run FILE.",
)
@told_if_ended(GOES_ON)
def run(
    file: Path,
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
    scale_lr: int | None,
    controls: Sequence[str],
    runs: str,
    stores: Path,
    profile: bool,
    processes: int | None,
) -> None:
    """Run an experiment, or go on with one that was stopped.

    Everything goes to runs/<name>/: metrics, TensorBoard events, checkpoints, the students as
    safetensors, and report.md.
    """
    from distill.experiment_file import open_experiment
    from distill.run_directory import forgotten_files

    experiment, registry = open_experiment(file, overrides, plugin_files)
    registry.forgotten = forgotten_files(Path(runs) / experiment.name, plugin_files)
    if scale_lr is not None:
        from distill.config.lr_scaling import scale_learning_rates

        experiment, lines = scale_learning_rates(experiment, scale_lr)
        if os.environ.get("RANK", "0") == "0" and processes is None:
            click.echo("\n".join(lines))
    if processes is not None and "RANK" not in os.environ:
        from distill.experiment_check import check_to_run
        from distill.launcher import launch, without_processes

        allowed = {"allow_remote_code": allow_remote_code}
        check_to_run(experiment, registry, controls=controls, **allowed)
        sys.exit(launch(processes, without_processes(sys.argv[1:])))
    from distill.runner import run as run_experiment

    allowed = {"allow_remote_code": allow_remote_code}
    run_experiment(
        experiment,
        registry=registry,
        runs=runs,
        controls=controls,
        profile=profile,
        stores=stores,
        **allowed,
    )


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@plugin_option
@remote_code_option
@click.option(
    "--data", is_flag=True, help="Open data sets and checkpoints too, and run two samples."
)
@stores_option
@quick()
def check(
    file: Path,
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
    data: bool,
    stores: Path,
) -> None:
    """Report everything that is wrong with an experiment file, without running it.

    Models are built without memory; data, checkpoints and weights are looked at only with --data.
    """
    from distill.experiment_file import open_experiment

    experiment, registry = open_experiment(file, overrides, plugin_files)
    from distill.training.check import refusals, refuse_faults

    allowed = {"allow_remote_code": allow_remote_code}
    if data:
        gc.enable()  # what two samples leave behind may be large
        from distill.experiment_check import check as check_experiment

        check_experiment(experiment, registry, data=True, stores=stores, **allowed)
    else:  # without what trains, whose import takes a while
        refuse_faults(experiment, registry, **allowed)
    stages, models = len(experiment.stages), len(experiment.models)
    opened = "two samples have gone through every stage"
    unopened = "data and checkpoints not opened, see --data"
    click.echo(
        f"{file}: no faults ({stages} stage{'s' * (stages != 1)}, "
        f"{models} model{'s' * (models != 1)}); {opened if data else unopened}"
    )
    if not allow_remote_code:
        for fault in refusals(experiment, registry):
            click.echo(f"remote code: {fault.path}: {fault.message}; what uses it is not checked")


@main.command(name="eval")
@click.argument("source", metavar="RUN|FILE", type=click.Path(path_type=Path))
@set_option
@plugin_option
@remote_code_option
@click.option("--dataset", help="Name of a data set of the file.  [default: the test data]")
@click.option("--stage", help="Stage whose student or teacher is meant.  [default: the last]")
@click.option(
    "--model", default="student", show_default=True, help="student, a teacher's name, or a model's."
)
@click.option("--seed", type=int, help="Seed of a run with several.  [default: the first]")
@click.option(
    "--weights",
    type=click.Choice(["last", "best", "ema"]),
    help="Which of the student's weights.  [default: those the stage kept]",
)
def evaluate(
    source: Path,
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
    dataset: str | None,
    stage: str | None,
    model: str,
    seed: int | None,
    weights: str | None,
) -> None:
    """Measure a student or teacher of a run (a folder) or of an experiment file.

    Metrics that compare with a teacher are left out.
    """
    from distill.model_evaluation import evaluate as evaluate_model
    from distill.run_directory import forgotten_files
    from distill.trained import Choice, find_stage, trained_model

    directory = source if source.is_dir() else None
    file = source / "resolved.yaml" if directory else source
    from distill.experiment_file import open_experiment

    experiment, registry = open_experiment(file, overrides, plugin_files)
    registry.forgotten = forgotten_files(source, plugin_files) if directory else ()
    choice = Choice(model, stage, seed, weights)
    allowed = {"allow_remote_code": allow_remote_code}
    module, described = trained_model(experiment, registry, choice, directory, **allowed)
    on, metrics = evaluate_model(
        experiment, registry, module, stage=stage, dataset=dataset, **allowed
    )
    click.echo(f"{described}, on data set {on}:")
    for name, value in metrics.items():
        click.echo(f"  {name} {value:.4f}")
    asked = experiment.test.metrics if experiment.test else find_stage(experiment, stage).metrics
    for metric in asked:
        if not any(name.partition("/")[0] == metric.name for name in metrics):
            click.echo(f"  {metric.name}: not here, it compares with a teacher during a run")


@main.command()
@click.argument("source", metavar="MODEL|FILE")
@click.option("--input", "shape", metavar="C,H,W", help="Shape of one input, e.g. 3,224,224.")
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="Parameter of MODEL.")
@click.option("--model", help="Of FILE: only this model.")
@set_option
@plugin_option
@remote_code_option
@quick()
def inspect(
    source: str,
    shape: str | None,
    params: Sequence[str],
    model: str | None,
    overrides: Sequence[str],
    plugin_files: Sequence[Path],
    allow_remote_code: bool,
) -> None:
    """Show a model's module paths with output shapes, to choose references from.

    MODEL is the name of a model that a plugin brings; FILE is an experiment, whose models are
    shown with the shape of its own data unless --input is given.
    """
    from distill.inspection import models_of_file, named_model, table

    given = _shape(shape) if shape else None
    if source.endswith((".yaml", ".yml")) or Path(source).is_file():
        from distill.experiment_file import open_experiment

        experiment, registry = open_experiment(Path(source), overrides, plugin_files)
        shown = models_of_file(
            experiment, registry, model, given, allow_remote_code=allow_remote_code
        )
    else:
        from distill.plugins import plugins as load_plugins

        registry = load_plugins(plugin_files)
        shown = [named_model(registry, source, params, given, allow_remote_code=allow_remote_code)]
    for text in (table(entry) for entry in shown):
        click.echo(text)


def _shape(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--input {text}: write numbers with commas, e.g. 3,224,224") from None
