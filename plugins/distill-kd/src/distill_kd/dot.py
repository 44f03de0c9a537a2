"""DOT, Zhao et al. 2023: SGD with a momentum of its own for the distillation loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from distill.parameters import check

Gradients = dict[Tensor, Tensor]
TASK, DISTILLATION = "momentum_buffer", "distillation_momentum_buffer"
ROUNDING = 1e-9


class DOT(Optimizer):
    r"""SGD that lets the gradient of distillation terms live longer than that of the others.

    .. math::
        v_{task} &\leftarrow (\mu - \Delta) \, v_{task} + g_{task} + \lambda \theta \\
        v_{kd} &\leftarrow (\mu + \Delta) \, v_{kd} + g_{kd} \\
        \theta &\leftarrow \theta - \eta \, (v_{task} + v_{kd})

    ``g_kd`` is the gradient of ``distillation_terms`` with their weights, ``g_task`` that of the
    stage's other terms. With ``delta`` 0 it is SGD with momentum on their sum. A parameter that
    only one of the two kinds depends on, such as a regressor's, is followed with momentum ``mu``,
    weight decay included.

    The labels must be a term of their own: ``KDLoss`` holds a cross entropy and the KL divergence
    in one, so write ``CrossEntropyLoss`` with its weight, and ``KDLoss`` with ``alpha: 0``,
    ``beta: 1`` and the other one.

    A step takes a second backward and twice SGD's memory. ``clip.norm`` bounds the norm of
    ``g_task + g_kd``, and both are scaled by the same factor; ``clip.value`` bounds the elements of
    each. ``parallel: fsdp`` is refused.

    Args:
        params: parameters, or groups of them.
        distillation_terms: names of the terms of the criterion that distil; some must be left.
        lr: eta >= 0.
        momentum: mu.
        delta: Delta; ``momentum - delta`` and ``momentum + delta`` must be from 0 to 1. The authors
            take 0.075 on CIFAR-100 and 0.09 on ImageNet.
        weight_decay: lambda >= 0, of ``theta``, as in SGD.

    Attributes:
        gradients_apart: parameter -> ``g_kd``, set before each ``step``; ``g_task`` is in
            ``parameter.grad``. One that is in neither place is left as it is.

    Raises:
        ValueError: a parameter out of range, in a group too, and where a scheduler moves it there;
            no terms.

    Equals the authors' ``DistillationOrientedTrainer`` with ``momentum = mu - Delta`` and
    ``momentum_kd = mu + Delta``, but for a parameter that the distillation terms alone depend on:
    theirs leaves weight decay out in its first step.

    Source: Zhao, Cui, Song, Liang, *DOT: A Distillation-Oriented Trainer*, ICCV 2023,
    https://arxiv.org/abs/2307.08436; code https://github.com/megvii-research/mdistiller,
    ``mdistiller/engine/dot.py``.

    Example:
        >>> import torch
        >>> from distill_kd.dot import DOT
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = DOT([weight], ["kd"], lr=0.1, momentum=0.5, delta=0.5)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([1.0])
        ...     optimizer.gradients_apart = {weight: torch.tensor([2.0])}
        ...     optimizer.step()
        >>> round(weight.item(), 4)
        -0.8
    """

    takes_apart: ClassVar[str] = "distillation_terms"

    def __init__(
        self,
        params: Iterable[Any],
        distillation_terms: Sequence[str],
        lr: float = 1e-3,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        is_list = not isinstance(distillation_terms, str) and len(distillation_terms) > 0
        check(self, self.takes_apart, distillation_terms, is_list, "a list of terms' names")
        self.distillation_terms = tuple(distillation_terms)
        self.gradients_apart: Mapping[Tensor, Tensor] = {}
        defaults = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of parameters with settings of its own.

        Raises:
            ValueError: if one of them is out of range.
        """
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Follow ``gradients_apart`` and each ``parameter.grad`` once."""
        for group in self.param_groups:
            self._check(group)
            found: Gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            apart = {p: self.gradients_apart.get(p) for p in group["params"]}
            distillation: Gradients = {p: g for p, g in apart.items() if g is not None}
            task = _decayed(found, group)
            alone = {p: g for p, g in distillation.items() if p not in task}
            both = [p for p in task if p in distillation]
            delta = group["delta"]
            self._follow(both, TASK, task, group, -delta)
            self._follow(both, DISTILLATION, distillation, group, delta)
            self._follow([p for p in task if p not in distillation], TASK, task, group, 0.0)
            self._follow(alone, DISTILLATION, _decayed(alone, group), group, 0.0)

    def _follow(
        self,
        parameters: Iterable[Tensor],
        buffer: str,
        gradients: Gradients,
        group: Mapping[str, Any],
        delta: float,
    ) -> None:
        parameters = list(parameters)
        if not parameters:
            return
        for parameter in parameters:
            if buffer not in self.state[parameter]:
                self.state[parameter][buffer] = torch.zeros_like(parameter)
        velocities = [self.state[parameter][buffer] for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"] + delta)
        torch._foreach_add_(velocities, [gradients[parameter] for parameter in parameters])
        torch._foreach_add_(parameters, velocities, alpha=-group["lr"])

    def _check(self, group: Mapping[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            check(self, name, group[name], 0 <= group[name] < math.inf, "a finite number >= 0")
        momentum, delta = group["momentum"], group["delta"]
        check(self, "momentum", momentum, 0 <= momentum <= 1, "from 0 to 1")
        most = min(momentum, 1 - momentum)
        allowed = f"from {-most:g} to {most:g}, so that momentum -/+ delta are from 0 to 1"
        check(self, "delta", delta, abs(delta) <= most + ROUNDING, allowed)


def _decayed(gradients: Gradients, group: Mapping[str, Any]) -> Gradients:
    """Return gradients with that of the weight decay added."""
    if not gradients or not group["weight_decay"]:
        return gradients
    parameters = list(gradients)
    summed = torch._foreach_add(list(gradients.values()), parameters, alpha=group["weight_decay"])
    return dict(zip(parameters, summed, strict=True))
