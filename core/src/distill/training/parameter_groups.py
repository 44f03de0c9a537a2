"""What the optimizer changes, in groups with settings of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from distill.config.experiment import Component, Stage
from distill.errors import ConfigError, DistillError, Fault
from distill.training.build import Builder
from distill.training.selection import select_parameters

Group = dict[str, Any]


def parameter_groups(
    builder: Builder, stage: Stage, trained: Mapping[str, nn.Module]
) -> list[Group]:
    """Return the trainable parameters as torch's optimizers take them, the main group first.

    A parameter belongs to the first of the file's groups that means it. Those without weight decay
    are parted from the others of their group.

    Args:
        builder: for faults, and for what the optimizer takes.
        stage: the description.
        trained: what the stage trains, by name.

    Raises:
        ConfigError: if a group or ``no_decay`` means nothing, or has settings that the optimizer
            has not.
    """
    faults = list(_faulty_settings(builder, stage))
    waiting = {id(p): p for m in trained.values() for p in m.parameters() if p.requires_grad}
    taken: set[int] = set()
    chosen: list[tuple[list[nn.Parameter], Mapping[str, Any]]] = []
    for group in stage.optimizer.groups:
        meant = _select(builder, trained, group.match, (*group.path, "match"), faults)
        if meant and meant.keys() <= taken:
            text = "every parameter that it names belongs to a group before it"
            faults.append(builder.experiment.fault((*group.path, "match"), text))
        taken |= meant.keys()
        chosen.append(([waiting.pop(i) for i in meant if i in waiting], group.params))
    path = (*stage.optimizer.component.path, "no_decay")
    exempt = _select(builder, trained, stage.optimizer.no_decay, path, faults)
    if faults:
        raise ConfigError(faults)
    groups: list[Group] = []
    for parameters, settings in [(list(waiting.values()), {}), *chosen]:
        decayed = [p for p in parameters if id(p) not in exempt]
        others = [p for p in parameters if id(p) in exempt]
        groups.append({"params": decayed, **settings})
        groups.append({"params": others, **settings, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _select(
    builder: Builder,
    trained: Mapping[str, nn.Module],
    entries: Iterable[str],
    path: tuple[str | int, ...],
    faults: list[Fault],
) -> dict[int, nn.Parameter]:
    meant: dict[int, nn.Parameter] = {}
    for number, entry in enumerate(entries):
        try:
            meant.update({id(p): p for p in select_parameters(entry, trained)})
        except DistillError as error:
            faults.append(builder.experiment.fault((*path, number), str(error)))
    return meant


def _faulty_settings(builder: Builder, stage: Stage) -> Iterable[Fault]:
    """Yield faults of settings that the optimizer does not take; torch would ignore them."""
    optimizer = stage.optimizer.component
    if builder.faults("optimizers", optimizer, provided=1):
        return  # told elsewhere
    for group in stage.optimizer.groups:
        one = Component(optimizer.type, {**optimizer.params, **group.params}, group.path)
        yield from builder.faults("optimizers", one, provided=1)
    if stage.optimizer.no_decay:
        decay = Component(optimizer.type, {**optimizer.params, "weight_decay": 0.0}, ())
        if builder.faults("optimizers", decay, provided=1):
            path = (*optimizer.path, "no_decay")
            yield builder.experiment.fault(path, f"{optimizer.type} has no weight decay")
