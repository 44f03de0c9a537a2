"""Optimizer, schedulers and gradient scaler of a stage, in one piece to step and to save."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from distill.config.experiment import Clip, Component, Scheduler, Stage
from distill.model.criterion import TOTAL, Criterion
from distill.training import sharding
from distill.training.build import Builder
from distill.training.metrics import is_higher_better
from distill.training.non_finite import is_overflow
from distill.training.parameter_groups import parameter_groups
from distill.training.schedule import Schedule, watches
from distill.training.split_gradients import Split, terms_apart

Outcome = Literal["followed", "deferred", "overflow", "not finite"]
FORMS = {"fused", "foreach", "capturable"}
"""What an optimizer says of how it computes."""


@dataclass
class Optimization:
    """What changes the weights.

    Attributes:
        schedule: of the learning rates, or ``None``.
        scaler: of the loss in fp16, or ``None``.
        clip: bounds of the gradient: of its norm, or of each element. Where some terms' gradient is
            taken apart, of the norm of the sum of both, which are then scaled alike; or of each
            element of either.
        split: what takes some terms' gradient apart, for an optimizer that wants it so.
        defers: whether nobody waits for the device to tell if a gradient is finite.
        leaves_out: whether the optimizer by itself leaves out a step whose gradient is not.
        verdict: of the last step that was deferred: above 0 if its gradient was not finite, and the
            scale of the loss behind it, 0 without a scaler.
        parameters: everything that is trained.
    """

    optimizer: torch.optim.Optimizer
    schedule: Schedule | None = None
    scaler: torch.amp.GradScaler | None = None
    clip: Clip = field(default_factory=Clip)
    split: Split | None = None
    defers: bool = False
    leaves_out: bool = False
    verdict: torch.Tensor | None = field(default=None, init=False, repr=False)
    _is_done: bool = field(default=True, init=False, repr=False)

    def backward_of(self, losses: Mapping[str, torch.Tensor], share: float) -> None:
        """Add the gradient of a batch's weighted terms, times its share, to that of the step."""
        if self.split is not None:
            self.backward(*self.split.parts(losses, share))
            return
        total = losses[TOTAL]
        self.backward(total if share == 1.0 else total * share)

    def backward(self, loss: torch.Tensor, apart: torch.Tensor | None = None) -> None:
        """Add the gradient of ``loss`` to that of the step, and another one to that apart."""
        if self._is_done:
            # Only now: given back earlier, its memory has to be fetched anew (7 % of a step).
            self.optimizer.zero_grad(set_to_none=True)
            if self.split is not None:
                self.split.clear()
            self._is_done = False
        if self.split is not None and apart is not None:
            self.split.add(apart if self.scaler is None else self.scaler.scale(apart))
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> Outcome:
        """Follow the gradient once.

        Returns:
            ``followed``; ``deferred`` if the device decides and ``verdict`` says how; ``overflow``
            if an element is not finite under a scaler, which then lowers its scale; ``not finite``
            if one is not finite otherwise, or the norm to clip by is not. Unless it is followed the
            weights stay as they are.
        """
        if self.defers:
            return self._deferred()
        scaler = self.scaler
        if self.split is not None:
            self.split.hand_over()
            self.split.unscale(scaler)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        is_finite = sharding.all_finite(self._gradients())
        if is_finite and self.clip.norm is not None:
            norm = self._norm()
            if not math.isfinite(norm.item()):
                return "not finite"
            self._clip_norm(norm)
        if is_finite:
            self._clip_values()
        if scaler is not None:
            scaler.step(self.optimizer)  # which leaves it out after an overflow
            scaler.update()
        elif is_finite:
            self.optimizer.step()
        if not is_finite and not is_overflow(0.0 if scaler is None else scaler.get_scale()):
            return "not finite"
        self._is_done = True
        return "followed" if is_finite else "overflow"

    def _deferred(self) -> Outcome:
        """Follow the gradient without waiting for the device to say whether it is finite.

        A fused optimizer leaves it out by itself if it is not. Others follow it all the same, and
        what they spoil is thrown away with the run, which ends as soon as the verdict is read.
        """
        assert self.scaler is None or self.split is None, "a scaler waits for what is taken apart"
        if self.split is not None:
            self.split.hand_over()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        device = self.parameters[0].device
        found = sharding.not_finite_anywhere([*self._gradients(), *self._apart()], device)
        overflown = found
        if self.clip.norm is not None:
            norm = self._norm()
            found = torch.maximum(found, (~norm.isfinite()).to(found))
            self._clip_norm(norm)
        self._clip_values()
        scale = torch.zeros_like(found)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # A scaler does not see an infinite norm, which a lower scale would not mend.
            scale = self.scaler.scale(overflown)
        elif self.leaves_out:
            # What GradScaler tells fused optimizers in the same way, who look for exactly 1.
            self.optimizer.found_inf = found  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        else:
            self.optimizer.step()
        self.verdict, self._is_done = torch.stack([found, scale]), True
        return "deferred"

    def __post_init__(self) -> None:
        self.parameters: list[nn.Parameter] = [
            p for group in self.optimizer.param_groups for p in group["params"]
        ]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def scale(self) -> float:
        """What losses are multiplied with for their backward."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all three; under sharding every process must ask for it."""
        return {
            "optimizer": sharding.whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        if self.schedule is not None:
            self.schedule.start_from(state["schedule"])
        saved = sharding.parted(state["optimizer"], self.parameters)
        # How it computes depends on the device, not on the checkpoint; where steps are counted too.
        forms = [{key: group[key] for key in FORMS & group.keys()} for group in self._groups]
        groups = [
            {**group, **form} for group, form in zip(saved["param_groups"], forms, strict=True)
        ]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})
        begin_momentum(self.optimizer)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _apart(self) -> list[torch.Tensor]:
        return list(self.split.gradients.values()) if self.split is not None else []

    def _norm(self) -> torch.Tensor:
        """Return the norm of the gradient, of the sum of both where some is taken apart."""
        gradients = self._gradients() if self.split is None else list(self.split.both())
        norm: torch.Tensor = sharding.whole(get_total_norm(gradients))
        return norm

    def _clip_norm(self, norm: torch.Tensor) -> None:
        assert self.clip.norm is not None
        parameters = [p for p in self.parameters if p.grad is not None]
        clip_grads_with_norm_(parameters, self.clip.norm, norm)
        if apart := self._apart():  # by the same factor
            torch._foreach_mul_(apart, (self.clip.norm / (norm + 1e-6)).clamp(max=1.0))

    def _clip_values(self) -> None:
        if self.clip.value is None:
            return
        clip_grad_value_(self.parameters, self.clip.value)
        for gradient in self._apart():
            gradient.clamp_(-self.clip.value, self.clip.value)


def build_optimization(
    builder: Builder,
    stage: Stage,
    trained: Mapping[str, nn.Module],
    device: torch.device,
    criterion: Criterion | None = None,
) -> Optimization:
    """Build the optimizer over what trains, its schedulers, and a scaler for fp16.

    Args:
        builder: for components.
        stage: the description.
        trained: what the stage trains, by name.
        device: of this process.
        criterion: whose terms an optimizer may take apart.

    Raises:
        ConfigError: if there is nothing to train, a group means nothing, a scheduler watches what
            is not measured, or the optimizer takes terms apart that are not there.
    """
    groups = parameter_groups(builder, stage, trained)
    if not groups:
        place = stage.places.get("freeze", stage.path)
        raise builder.experiment.error(place, "everything is frozen; nothing is left to train")
    component = stage.optimizer.component
    if device.type == "cuda" and not _has_sparse(trained.values()):
        component = fused(builder, component)
    optimizer = builder.component("optimizers", component, groups)
    begin_momentum(optimizer)
    schedule = build_schedule(builder, stage, optimizer)
    scaler = torch.amp.GradScaler(device.type) if stage.precision == "fp16" else None
    optimization = Optimization(optimizer, schedule, scaler, stage.clip)
    terms = terms_apart(builder, stage, optimizer)
    if terms and criterion is not None:
        optimization.split = Split(optimizer, criterion, terms, optimization.parameters)
    optimization.leaves_out = is_fused(optimizer) and not sharding.is_sharded(stage)
    # A scaler itself waits, to leave a step out, unless a fused optimizer does that.
    is_left_out = optimization.leaves_out and optimization.split is None
    waits = scaler is not None and not is_left_out
    optimization.defers = device.type == "cuda" and not waits
    return optimization


def fused(builder: Builder, component: Component) -> Component:
    """Return an optimizer's component in its fused form, if it has one and the file says nothing.

    That is one kernel instead of many, and leaves out by itself what is not finite.
    """
    factory = builder.registry.find("optimizers", component.type).factory
    choices = {"fused", "foreach", "differentiable", "capturable"}
    offered = inspect.signature(factory).parameters
    if "fused" not in offered or choices & component.params.keys():
        return component
    if component.params.get("dampening"):  # see ``begin_momentum``
        return component
    return replace(component, params={**component.params, "fused": True})


def _has_sparse(modules: Iterable[nn.Module]) -> bool:
    """Whether a module's gradient is sparse, which no fused optimizer takes."""
    return any(getattr(part, "sparse", False) for module in modules for part in module.modules())


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer can be told on the device to leave a step out."""
    groups = optimizer.param_groups
    knows = getattr(optimizer, "_step_supports_amp_scaling", False)
    return bool(knows) and all(group.get("fused") for group in groups)


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a fused SGD the zeros that its momentum begins with.

    Where there are none, torch takes uninitialised memory for the first gradient's, and leaves it
    as it is if that step is left out; and it fails where a parameter has its first gradient later
    than others. With dampening a first step is not one from zero.
    """
    if not isinstance(optimizer, torch.optim.SGD) or not is_fused(optimizer):
        return
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def build_schedule(
    builder: Builder, stage: Stage, optimizer: torch.optim.Optimizer
) -> Schedule | None:
    """Build the stage's schedulers.

    Raises:
        ConfigError: if one watches what is not measured, or in the wrong direction.
    """
    if not stage.schedulers:
        return None

    def build(entry: Scheduler, over: torch.optim.Optimizer) -> Any:
        scheduler = builder.component("schedulers", entry.component, over)
        if watches(scheduler):
            _check_watching(builder, stage, entry)
        elif entry.watch is not None:
            text = f"{entry.component.type} watches nothing"
            raise builder.experiment.error((*entry.component.path, "watch"), text)
        return scheduler

    return Schedule(optimizer, stage.schedulers, build, stage.decisive or "")


def _check_watching(builder: Builder, stage: Stage, entry: Scheduler) -> None:
    """Refuse a scheduler that watches a metric which is not measured, or in the wrong direction."""
    kind, place = entry.component.type, entry.component.path
    watched = entry.watch or stage.decisive
    if not (stage.data.validate and watched):
        if builder.experiment.gaps.explain((*stage.path, "data"), "validate"):
            return
        message = f"{kind} watches a validation metric; give data.validate and metrics"
        raise builder.experiment.error(place, message)
    metric = stage.metric(watched)
    if metric is None:
        return  # a fault of its own
    built = builder.component("metrics", metric.component)
    wanted = "max" if is_higher_better(built) else "min"
    if entry.component.params.get("mode", "min") != wanted:
        better = "higher" if wanted == "max" else "lower"
        message = f"{kind} watches '{watched}', which is better when {better}: mode: {wanted}"
        raise builder.experiment.error(place, message)
