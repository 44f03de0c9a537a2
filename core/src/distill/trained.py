"""Models of a run or of an experiment file, with the weights they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distill.config.experiment import Experiment, Stage
from distill.errors import StorageError, UsageError, did_you_mean
from distill.registry import Registry
from distill.run_directory import seed_directory
from distill.training.build import Builder
from distill.training.checkpoint import load_weights, peer_file


@dataclass(frozen=True)
class Choice:
    """Which model is meant.

    Attributes:
        model: ``student``, a teacher's or a peer's name in the stage, or a model's name in the
            file.
        stage: by default the last.
        seed: by default the first.
        weights: ``last``, ``best`` or ``ema``, of what the run trained; by default what the stage
            kept.
    """

    model: str = "student"
    stage: str | None = None
    seed: int | None = None
    weights: str | None = None


def find_stage(experiment: Experiment, name: str | None) -> Stage:
    """Return a stage by name, by default the last.

    Raises:
        UsageError: if there is none of that name.
    """
    stages = {stage.name: stage for stage in experiment.stages}
    if name is None:
        return experiment.stages[-1]
    if name not in stages:
        raise UsageError(_unknown("stage", name, stages, experiment))
    return stages[name]


def trained_model(
    experiment: Experiment,
    registry: Registry,
    choice: Choice,
    directory: Path | None,
    *,
    allow_remote_code: bool = False,
) -> tuple[nn.Module, str]:
    """Build a model with its weights, on the CPU in eval mode, and say where they come from.

    Args:
        experiment: the description.
        registry: where components are found.
        choice: which model.
        directory: the run's folder; without one, weights are those the file names.
        allow_remote_code: whether the model may fetch code from elsewhere and run it.

    Raises:
        UsageError: if there is no such model, or ``choice`` names weights of an untrained one.
        ConfigError: if it cannot be built, or runs code from elsewhere without being allowed to.
        StorageError: if the run has not trained it yet.
    """
    stage = find_stage(experiment, choice.stage)
    name = _model_name(experiment, stage, choice.model)
    seed = experiment.seeds[0] if choice.seed is None else choice.seed
    if seed not in experiment.seeds:
        known = ", ".join(map(str, experiment.seeds))
        raise UsageError(f"{experiment.document.file} has no seed {seed} (seeds: {known})")
    trained = _stages_that_train(experiment, stage, name) if directory is not None else []
    why = "" if trained else _why_untrained(experiment, stage, name, directory)
    if why and choice.weights is not None:
        hint = "; give a run's folder" if directory is None else ""
        raise UsageError(f"model {name} has no '{choice.weights}' weights: it is {why}{hint}")
    builder = Builder(experiment, registry, allow_remote_code=allow_remote_code)
    model = builder.model(name, seed).eval()
    if directory is None or not trained:
        origin = experiment.models[name].checkpoint or "as the file builds it"
        return model, f"model {name} ({origin}, {why})"
    last = trained[-1]
    folder = seed_directory(directory, experiment, seed) / last.name
    weights, file = _file(last, name, choice.weights)
    try:
        load_weights(model, folder / f"{file}.safetensors")
    except ValueError as error:
        raise StorageError(f"the run has no weights of '{name}': {error}") from error
    is_other = choice.stage not in (None, last.name)
    other = f" (stage {choice.stage} does not train it)" if is_other else ""
    return model, f"model {name}, {weights} of stage {last.name}{other}, seed {seed}"


def _model_name(experiment: Experiment, stage: Stage, name: str) -> str:
    roles = {role: entry.model for role, entry in stage.roles.items()} | stage.peers
    if name in roles:
        return roles[name]
    if name not in experiment.models:
        known = {**roles, **experiment.models}
        raise UsageError(_unknown("model", name, known, experiment))
    return name


def _stages_that_train(experiment: Experiment, last: Stage, model: str) -> list[Stage]:
    """Return the stages up to ``last`` that train ``model``."""
    upto = experiment.stages[: experiment.stages.index(last) + 1]
    return [stage for stage in upto if model in stage.trains]


def _why_untrained(experiment: Experiment, stage: Stage, model: str, directory: Path | None) -> str:
    """Say of a model that no stage up to ``stage`` trains, or of a file alone, what it is not."""
    if directory is None:
        return "not trained here"
    is_later = _stages_that_train(experiment, experiment.stages[-1], model)
    return f"not trained up to stage {stage.name}" if is_later else "not trained in this run"


def _file(stage: Stage, model: str, weights: str | None) -> tuple[str, str]:
    """Return which weights of a model that the stage trained are meant, and their file's name."""
    if stage.student.model == model:
        if weights == "ema" and stage.ema is None:
            raise UsageError(f"stage {stage.name} keeps no average ('ema')")
        return weights or stage.keep, weights or stage.keep
    if weights not in (None, "last"):
        raise UsageError(
            f"stage '{stage.name}' trained '{model}' beside its student; of such a model there are "
            f"only the last weights, not '{weights}'"
        )
    return "last", peer_file(model)


def _unknown(what: str, name: str, known: object, experiment: Experiment) -> str:
    names = list(known)  # type: ignore[call-overload]
    hint = did_you_mean(name, names) or f" (there are: {', '.join(names)})"
    return f"there is no {what} '{name}' in {experiment.document.file}{hint}"
