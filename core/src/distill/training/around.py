"""What a stage runs in a model's place, and what it puts around a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from distill.config.experiment import Role
from distill.errors import ConfigError, Fault
from distill.training.build import Builder


def redesigned(
    builder: Builder,
    role: Role,
    model: nn.Module,
    auxiliary: Mapping[str, nn.Module],
    faults: list[Fault],
) -> nn.Module:
    """Return what the stage runs in the model's place: the model itself unless the file says so."""
    if role.redesign is None:
        return model
    before = dict(model.named_modules())
    try:
        made = builder.redesigned(role.redesign, model, auxiliary)
    except ConfigError as error:
        faults.extend(error.faults)
        return model
    if dict(model.named_modules()) != before:
        message = (
            f"{role.redesign.type} changes the model for good, which a stage must not; write it "
            "under 'models'"
        )
        faults.append(builder.experiment.fault(role.redesign.path, message))
    return made


def special_module(builder: Builder, role: Role, model: nn.Module) -> nn.Module | None:
    """Return the module that calls the model, ``None`` if the model is called by itself.

    Raises:
        ConfigError: if it cannot be built, or has parameters besides the model's.
    """
    if role.special is None:
        return None
    special = builder.module("special_modules", role.special, model)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, tensor in (*special.named_parameters(), *special.named_buffers()):
        if id(tensor) not in own:
            message = (
                f"{role.special.type} has parameters or buffers of its own ({name}), which "
                "nothing would train or save; they belong into an auxiliary module"
            )
            raise builder.experiment.error(role.special.path, message)
    return special
