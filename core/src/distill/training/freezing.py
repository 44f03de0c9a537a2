"""What of a stage stays as it is: parameters, and running statistics if the file says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from distill.config.experiment import Freeze
from distill.errors import ConfigError, DistillError, Fault
from distill.training.build import Builder
from distill.training.selection import has_statistics, select_parameters, select_statistics
from distill.training.stage import Assembly


@dataclass
class Frozen:
    """What a stage freezes.

    Attributes:
        parameters: that get no gradient.
        held: modules that stay in eval mode.
        faults: entries that mean nothing.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    held: list[nn.Module] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def find_frozen(builder: Builder, assembly: Assembly) -> Frozen:
    """Return what the stage's ``freeze`` and its frozen auxiliary modules mean."""
    frozen, trained = Frozen(), assembly.trained()
    for entry in assembly.stage.freeze:
        try:
            _find(entry, trained, frozen)
        except DistillError as error:
            frozen.faults.append(builder.experiment.fault(entry.path, str(error)))
    for name, module in assembly.auxiliary.items():
        if assembly.stage.auxiliary[name].frozen:
            frozen.parameters += module.parameters()
            frozen.held += module.modules()
    return frozen


def _find(entry: Freeze, trained: Mapping[str, nn.Module], frozen: Frozen) -> None:
    try:
        frozen.parameters += select_parameters(entry.match, trained)
    except DistillError:
        if not entry.statistics or not has_statistics(entry.match, trained):
            raise  # else they are layers that have statistics alone
    if entry.statistics:
        frozen.held += select_statistics(entry.match, trained)


def freeze(builder: Builder, assembly: Assembly) -> None:
    """Freeze it, and modules that do not run, until the stage's roles are not in force any more.

    Raises:
        ConfigError: if an entry means nothing.
    """
    frozen = find_frozen(builder, assembly)
    if frozen.faults:
        raise ConfigError(frozen.faults)
    assembly.frozen = frozen.parameters
    for parameter in frozen.parameters:
        parameter.requires_grad_(False)
    for name in assembly.unasked:
        if name in assembly.auxiliary:
            assembly.auxiliary[name].requires_grad_(False)
    assert assembly.distiller is not None
    assembly.distiller.hold(frozen.held)
