"""The linear scaling rule: k times the samples a step, k times the learning rate.

Goyal et al., Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distill.config.experiment import Component, Experiment, Stage
from distill.errors import ConfigError, Fault

LEARNING_RATES = ("lr", "max_lr", "base_lr", "eta_min", "min_lr")
"""Parameters of optimizers and schedulers that are learning rates; all others are factors."""


def scale_learning_rates(experiment: Experiment, batch_size: int) -> tuple[Experiment, list[str]]:
    """Multiply every learning rate by the samples a step over those that it is meant for.

    Args:
        experiment: the description; its values are replaced, in ``resolved`` too.
        batch_size: samples a step that the file's learning rates are meant for.

    Returns:
        The experiment, and a line a stage that says what was scaled.

    Raises:
        ConfigError: if an optimizer's learning rate is not written in the file.
    """
    faults = [_unwritten(experiment, s) for s in experiment.stages if not _has_rate(s)]
    if faults:
        raise ConfigError(faults)
    factors = [
        stage.data.batch_size * stage.data.accumulate / batch_size for stage in experiment.stages
    ]
    stages = [_scaled(s, factor) for s, factor in zip(experiment.stages, factors, strict=True)]
    # Stages share what they inherit, which is scaled for each.
    plain_stages = [copy.deepcopy(plain) for plain in experiment.resolved["stages"]]
    resolved = {**experiment.resolved, "stages": plain_stages}
    for plain, factor in zip(plain_stages, factors, strict=True):
        _scale_plain(plain["optimizer"], factor)
        for group in plain["optimizer"].get("groups", []):
            _scale_plain(group, factor)
        entries = plain["scheduler"] or []
        for entry in [entries] if isinstance(entries, dict) else entries:
            _scale_plain(entry, factor)
    lines = [
        f"stage {old.name}: a step has {old.data.batch_size * old.data.accumulate:,} samples "
        f"instead of {batch_size:,}, lr {_rate(old):g} x {factor:g} = {_rate(new):g}"
        for old, new, factor in zip(experiment.stages, stages, factors, strict=True)
    ]
    return replace(experiment, stages=tuple(stages), resolved=resolved), lines


def _scaled(stage: Stage, factor: float) -> Stage:
    optimizer = replace(
        stage.optimizer,
        component=_scaled_component(stage.optimizer.component, factor),
        groups=tuple(
            replace(group, params=_scaled_params(group.params, factor))
            for group in stage.optimizer.groups
        ),
    )
    schedulers = tuple(
        replace(entry, component=_scaled_component(entry.component, factor))
        for entry in stage.schedulers
    )
    return replace(stage, optimizer=optimizer, schedulers=schedulers)


def _scaled_component(component: Component, factor: float) -> Component:
    return replace(component, params=_scaled_params(component.params, factor))


def _scaled_params(params: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        key: _times(value, factor) if key in LEARNING_RATES else value
        for key, value in params.items()
    }


def _scale_plain(component: dict[str, Any], factor: float) -> None:
    if "params" in component:
        component["params"] = _scaled_params(component["params"], factor)


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [_times(item, factor) for item in value]
    # Rounded as one would write it: 0.15, not 0.15000000000000002.
    return float(f"{value * factor:.12g}") if isinstance(value, (int, float)) else value


def _rate(stage: Stage) -> float:
    return float(stage.optimizer.component.params["lr"])


def _has_rate(stage: Stage) -> bool:
    return isinstance(stage.optimizer.component.params.get("lr"), (int, float))


def _unwritten(experiment: Experiment, stage: Stage) -> Fault:
    component = stage.optimizer.component
    return experiment.fault(component.path, f"--scale-lr: write params.lr of {component.type}")
