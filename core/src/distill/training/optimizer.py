"""Optimizer, scheduler and gradient scaler of a stage, in one piece to step and to save."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.config.experiment import Stage
from distill.training.build import Builder


@dataclass
class Optimization:
    """What changes the weights.

    Attributes:
        scheduler: stepped once an epoch, or ``None``.
        scaler: of the loss in fp16, or ``None``.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler | None

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of ``loss`` once."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def end_epoch(self, watched: float | None) -> None:
        """Step the scheduler; one that watches a metric is given the validation metric."""
        if self.scheduler is None:
            return
        if _watches(self.scheduler):
            self.scheduler.step(watched)
        else:
            self.scheduler.step()

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all three."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.optimizer.load_state_dict(state["optimizer"])
        for part, saved in ((self.scheduler, state["scheduler"]), (self.scaler, state["scaler"])):
            if part is not None:
                part.load_state_dict(saved)


def build_optimization(
    builder: Builder, stage: Stage, parameters: Sequence[nn.Parameter], device: torch.device
) -> Optimization:
    """Build the optimizer over ``parameters``, its scheduler, and a scaler for fp16.

    Raises:
        ConfigError: if there is nothing to train, or a scheduler watches what is not measured.
    """
    if not parameters:
        place = stage.places.get("freeze", stage.path)
        raise builder.experiment.error(place, "everything is frozen; nothing is left to train")
    optimizer = builder.component("optimizers", stage.optimizer, list(parameters))
    scheduler = build_scheduler(builder, stage, optimizer) if stage.scheduler else None
    scaler = torch.amp.GradScaler(device.type) if stage.precision == "fp16" else None
    return Optimization(optimizer, scheduler, scaler)


def build_scheduler(builder: Builder, stage: Stage, optimizer: torch.optim.Optimizer) -> Any:
    """Build the stage's scheduler.

    Raises:
        ConfigError: if it watches what is not measured, or in the wrong direction.
    """
    assert stage.scheduler is not None
    scheduler = builder.component("schedulers", stage.scheduler, optimizer)
    if _watches(scheduler):
        _check_watching(builder, stage)
    return scheduler


def _watches(scheduler: Any) -> bool:
    return "metrics" in inspect.signature(scheduler.step).parameters


def _check_watching(builder: Builder, stage: Stage) -> None:
    """Refuse a scheduler that watches a metric which is not measured, or in the wrong direction."""
    scheduler, place = stage.scheduler, stage.places["scheduler"]
    assert scheduler is not None
    if not (stage.data.validate and stage.metrics):
        message = f"{scheduler.type} watches a validation metric; give data.validate and metrics"
        raise builder.experiment.error(place, message)
    if scheduler.params.get("mode", "min") != "max":
        watched = stage.metrics[0].type
        message = f"{scheduler.type} watches '{watched}', which is better when higher: mode: max"
        raise builder.experiment.error(place, message)
