"""Gradients of some terms apart from those of the others, for optimizers that follow them so.

Such an optimizer's class has ``takes_apart``, the name of its parameter that lists the terms, which
its objects keep under the same name. Before each ``step`` it finds the gradient of those terms in
``gradients_apart``, parameter -> gradient, and that of the others in ``parameter.grad`` as ever.
Both are of weighted terms, accumulated over the batches of the step, averaged over processes and
clipped. A parameter that no term of the one or of the other kind depends on has none of that kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distill import distributed
from distill.config.experiment import Stage
from distill.errors import ConfigError, Fault, did_you_mean
from distill.model.criterion import Criterion
from distill.training import sharding
from distill.training.build import Builder


class Split:
    """Takes the gradient of some terms apart.

    It costs a second backward of every batch, and the memory of the gradients once more.

    Args:
        optimizer: which takes them so.
        criterion: whose weights hold.
        terms: names of those that are taken apart; some others are left.
        parameters: that train.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        terms: Sequence[str],
        parameters: Sequence[nn.Parameter],
    ):
        self._optimizer = optimizer
        self._criterion = criterion
        self._apart = set(terms)
        self._parameters = list(parameters)
        self._found: dict[nn.Parameter, torch.Tensor] = {}
        self._only_apart: list[int] | None = None

    @property
    def gradients(self) -> Mapping[nn.Parameter, torch.Tensor]:
        """The gradients of the terms apart, as far as they are added up."""
        return self._found

    def parts(
        self, losses: Mapping[str, torch.Tensor], share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the other terms, and that of the terms apart."""
        apart, rest = self._sum(losses, True) * share, self._sum(losses, False) * share
        if self._only_apart is None:
            alone = _parameters_behind(apart) - _parameters_behind(rest)
            numbers = [n for n, p in enumerate(self._parameters) if p in alone]
            self._only_apart = distributed.from_main(numbers)
        # DDP waits for every parameter's gradient in the one backward that it sees.
        return rest + 0.0 * apart, apart

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self._found = {}

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradient of ``loss`` for each parameter, and leave ``loss`` its graph."""
        gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
            loss, self._parameters, retain_graph=True, allow_unused=True
        )
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter in self._found:
                self._found[parameter].add_(gradient)
            else:
                self._found[parameter] = gradient.clone()  # which two parameters may share

    def hand_over(self) -> None:
        """Average over processes, and hand the gradients over; to be called on all of them."""
        if distributed.world_size() > 1:
            self._average()
        for number in self._only_apart or ():
            self._parameters[number].grad = None
        self._optimizer.gradients_apart = self._found  # type: ignore[attr-defined]

    def unscale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Free what was handed over of the loss's scale.

        A gradient that is not finite is added to ``parameter.grad``, where it is looked for.
        """
        if not sharding.all_finite(list(self._found.values())):
            for parameter, gradient in self._found.items():
                given = parameter.grad
                parameter.grad = gradient if given is None else given + gradient
        elif scaler is not None and self._found:
            torch._foreach_mul_(list(self._found.values()), 1.0 / scaler.get_scale())

    def both(self) -> Iterator[torch.Tensor]:
        """Yield the sum of both gradients of each parameter that has one."""
        for parameter in self._parameters:
            rest, apart = parameter.grad, self._found.get(parameter)
            if rest is not None:
                yield rest if apart is None else rest + apart
            elif apart is not None:
                yield apart

    def _sum(self, losses: Mapping[str, torch.Tensor], is_apart: bool) -> torch.Tensor:
        names = [n for n in self._criterion.weights if (n in self._apart) == is_apart]
        return reduce(torch.add, [losses[n] * self._criterion.weights[n] for n in names])

    def _average(self) -> None:
        """Exchange all gradients in one flat buffer, with what no process has left out."""
        own = [self._found.get(p) for p in self._parameters]
        pairs = list(zip(self._parameters, own, strict=True))
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]
        flags = flat[0].new_tensor([g is not None for g in own])
        buffer = torch.cat([flags, *flat])
        dist.all_reduce(buffer)
        buffer /= distributed.world_size()
        is_there = (buffer[: len(own)] > 0).tolist()
        parts = buffer[len(own) :].split([part.numel() for part in flat])
        self._found = {
            parameter: part.view_as(parameter).to(parameter.dtype)
            for parameter, part, there in zip(self._parameters, parts, is_there, strict=True)
            if there
        }


def terms_apart(
    builder: Builder, stage: Stage, optimizer: torch.optim.Optimizer
) -> tuple[str, ...]:
    """Return the terms whose gradient an optimizer takes apart: none, for most optimizers.

    Raises:
        ConfigError: if the stage has no such terms, or no others; if it is sharded, where gradients
            cannot be taken apart; or if a group of parameters names terms of its own.
    """
    parameter = getattr(optimizer, "takes_apart", None)
    if parameter is None:
        return ()
    terms = tuple(getattr(optimizer, parameter))
    faults = list(_faults(builder, stage, parameter, terms))
    if faults:
        raise ConfigError(faults)
    return tuple(dict.fromkeys(terms))


def _faults(
    builder: Builder, stage: Stage, parameter: str, terms: Sequence[str]
) -> Iterator[Fault]:
    fault, known = builder.experiment.fault, list(stage.criterion)
    component = stage.optimizer.component
    place: tuple[Any, ...] = (*component.path, "params", parameter)
    place = place if parameter in component.params else component.path
    for number, name in enumerate(terms):
        if name not in known and known and not _is_lost(builder, stage, name):
            hint = did_you_mean(name, known) or f" (there are: {', '.join(known)})"
            at = (*place, number) if place != component.path else place
            yield fault(at, f"stage '{stage.name}' has no term '{name}'{hint}")
    if not terms:
        text = f"name the terms that {component.type} takes apart (there are: {', '.join(known)})"
        yield fault(place, text)
    if known and set(known) <= set(terms):
        text = (
            f"stage '{stage.name}' has no other terms than these for {component.type} to take them "
            "apart from; give the labels a term of their own, or take another optimizer"
        )
        yield fault(place, text)
    for group in stage.optimizer.groups:
        if parameter in group.params:
            text = f"'{parameter}' holds for all groups; give it in the optimizer's params"
            yield fault((*group.path, "params", parameter), text)
    if stage.parallel == "fsdp":
        text = f"{component.type} takes gradients apart, which fsdp cannot; use parallel: ddp"
        yield fault(stage.places.get("parallel", component.path), text)


def _is_lost(builder: Builder, stage: Stage, name: str) -> bool:
    """Whether a fault already told hides the term."""
    place = stage.places.get("criterion", (*stage.path, "criterion"))
    return builder.experiment.gaps.explain(place, name)


def _parameters_behind(loss: torch.Tensor) -> set[Any]:
    """Return the parameters that a loss depends on."""
    found: set[Any] = set()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found
