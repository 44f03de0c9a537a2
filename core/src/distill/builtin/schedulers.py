"""Learning-rate schedules that torch does not have in one piece."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupPolynomialLR(LRScheduler):
    """A linear warm-up, then a polynomial decay.

    With t the iterations done and ``lr`` the optimizer's: from ``start_factor * lr`` at t = 0 in a
    straight line to ``lr`` at ``warmup_iters``; then, p being the part done of the way from there
    to ``total_iters``, ``(end_factor + (1 - end_factor) * (1 - p) ** power) * lr``; constant after.
    An iteration is an epoch or a step, whichever the scheduler is stepped by.

    The rate depends on t and the rates at the beginning alone, so a continued run has the same.

    Args:
        optimizer: whose rates are set.
        total_iters: where the decay ends.
        warmup_iters: where the warm-up ends; 0 for none. With a ``start_factor`` of 0 the first
            iteration of a warm-up trains nothing.
        power: 1 is linear.
        start_factor: of the rate at the start of the warm-up.
        end_factor: of the rate at the end of the decay.

    Raises:
        ValueError: if ``warmup_iters`` is negative or not below ``total_iters``, ``power`` is not
            positive, or a factor is negative.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int,
        warmup_iters: int = 0,
        power: float = 1.0,
        start_factor: float = 0.0,
        end_factor: float = 0.0,
    ):
        if not 0 <= warmup_iters < total_iters:
            raise ValueError(
                f"warmup_iters must be from 0 to below total_iters ({total_iters}), "
                f"got {warmup_iters}"
            )
        if power <= 0:
            raise ValueError(f"power must be positive, got {power}")
        if min(start_factor, end_factor) < 0:
            raise ValueError(
                f"start_factor and end_factor cannot be negative, got {start_factor} and "
                f"{end_factor}"
            )
        self.total_iters, self.warmup_iters, self.power = total_iters, warmup_iters, power
        self.start_factor, self.end_factor = start_factor, end_factor
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the rate of each parameter group."""
        factor = self._factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]

    def _factor(self, done: int) -> float:
        if done < self.warmup_iters:
            return self.start_factor + (1 - self.start_factor) * done / self.warmup_iters
        part = (done - self.warmup_iters) / (self.total_iters - self.warmup_iters)
        left: float = (1 - min(1.0, part)) ** self.power
        return self.end_factor + (1 - self.end_factor) * left
