"""Other forms of a model: a row of its own modules, nothing of it, or all of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distill import DistillError


def sequential(
    model: nn.Module, auxiliary: Mapping[str, nn.Module], modules: list[str | dict[str, str]]
) -> nn.Sequential:
    """Return a row of a model's own modules, with auxiliary modules between them.

    For models whose forward can be written as a row. What the forward does beside its modules, such
    as ``torch.flatten`` before a linear layer, has to be an auxiliary module (``Flatten``).

    Args:
        model: the model.
        auxiliary: the stage's auxiliary modules.
        modules: paths in the model (``conv1``, ``layer1.0``), and ``{auxiliary: name}`` for
            auxiliary modules, which then take no ``inputs``.

    Raises:
        ValueError: if there is no such module, or one comes twice.
    """
    row: OrderedDict[str, nn.Module] = OrderedDict()
    for entry in modules:
        if isinstance(entry, str):
            name, module = entry, _own(model, entry)
        else:
            name, module = _between(auxiliary, entry)
        # A dot would part a path.
        name = name.replace(".", "_")
        if name in row:
            raise ValueError(f"'{name}' comes twice; each module has one place in the row")
        row[name] = module
    return nn.Sequential(row)


def _own(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{type(model).__name__} has no module '{path}' (it has: {known})"
        ) from None


def _between(auxiliary: Mapping[str, nn.Module], entry: dict[str, str]) -> tuple[str, nn.Module]:
    if list(entry) != ["auxiliary"]:
        raise ValueError(f"{entry} is neither a path in the model nor {{auxiliary: name}}")
    name = entry["auxiliary"]
    if name not in auxiliary:
        known = ", ".join(auxiliary) or "none"
        raise ValueError(f"the stage has no auxiliary module '{name}' (it has: {known})")
    return name, auxiliary[name]


class Empty(nn.Module):
    """A model of which nothing is left."""

    def forward(self, *_: Any) -> torch.Tensor:
        """Refuse to run.

        Raises:
            DistillError: always.
        """
        raise DistillError("its redesign is 'empty', and something asks for its output")


def empty(model: nn.Module) -> Empty:
    """Return nothing of a model: for a stage that runs only the teacher."""
    return Empty()


def whole(model: nn.Module) -> nn.Module:
    """Return the model as it is, which keeps a stage from cutting it to what it needs."""
    return model
