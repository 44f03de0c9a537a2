"""A model less what leads to nothing asked of it, taken only if it is seen to give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from distill import randomness
from distill.data.batch import map_tensors
from distill.model.branches import Pruned, Untraceable, without_side_branches
from distill.model.wiring import Values

Gives = Callable[[nn.Module | None], Values]
"""Returns what a step reads of a model, or of another form of it that runs in its place."""


class CutError(Exception):
    """A model's side branches, if there are any, have to run; the text says why."""


def cut_branches(
    model: nn.Module, paths: Iterable[str], parts: Sequence[str], gives: Gives
) -> Pruned | None:
    """Return a model without its side branches.

    Args:
        model: in the mode in which it will run.
        paths: what is captured in it.
        parts: keys or positions of the output that are asked for.
        gives: runs it.

    Returns:
        What is left of it; ``None`` if there are no such branches.

    Raises:
        CutError: if it cannot be traced, or what is left of it gives something else.
    """
    tapped = {path.partition("@")[0].partition(":")[0] for path in paths}
    try:
        pruned = without_side_branches(model, tapped, parts)
    except Untraceable as error:
        raise CutError(f"it cannot be traced ({error})") from error
    if pruned is not None and not _gives_the_same(model, pruned.module, gives):
        raise CutError("what its trace gives is not what it gives")
    return pruned


def _gives_the_same(model: nn.Module, pruned: nn.Module, gives: Gives) -> bool:
    """Whether a model gives the same without its side branches as before it and after it.

    One that counts its calls may agree by chance with one of the two.
    """
    try:
        before, without, after = (_drawn_alike(model, gives, form) for form in (None, pruned, None))
    except Exception:  # foreign code in another form; what fails without it is told later
        return False
    return _same_values(before, without) and _same_values(without, after)


def _drawn_alike(model: nn.Module, gives: Gives, form: nn.Module | None) -> Values:
    """Return what a step reads of a form of the model, drawn from one seed."""
    with torch.no_grad(), _dropouts_off(model), randomness.torch_forked():
        torch.manual_seed(0)
        return gives(form)


@contextmanager
def _dropouts_off(model: nn.Module) -> Iterator[None]:
    """Let dropouts pass: a model with fewer of them draws other numbers for the rest."""
    dropouts = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.training]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module in dropouts:
            module.training = True


def _same_values(one: Any, other: Any) -> bool:
    """Whether two values hold the same tensors; what else they hold does not matter."""
    pairs: list[list[torch.Tensor]] = [[], []]
    for value, found in zip((one, other), pairs, strict=True):
        map_tensors(partial(_keep, found), value)
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def _keep(found: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    found.append(tensor)
    return tensor
