"""The weight of a term over a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WeightSchedule:
    """A ramp from ``start`` to ``end``, and an end of it all.

    In the n-th epoch (or step), counted from 1, the weight is ``start`` until ``after`` are over,
    then approaches ``end``, which it has from the epoch ``after + over`` on, and is 0 once ``stop``
    are over. So ``WeightSchedule(0.0, 1.0, over=20)`` is DKD's ``min(epoch / 20, 1)``.

    >>> [WeightSchedule(over=4).at(epoch, 0) for epoch in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]

    Args:
        start: weight before the ramp.
        end: weight after it.
        over: length of the ramp, 0 for none.
        after: where the ramp begins.
        stop: ``None`` for never.
        shape: ``linear``, or ``cosine`` for half a wave.
        unit: what is counted.
    """

    start: float = 0.0
    end: float = 1.0
    over: int = 0
    after: int = 0
    stop: int | None = None
    shape: Literal["linear", "cosine"] = "linear"
    unit: Literal["epochs", "steps"] = "epochs"

    def at(self, epoch: int, step: int) -> float:
        """Return the weight in an epoch and step of the stage, both counted from 0."""
        number = (epoch if self.unit == "epochs" else step) + 1
        if self.stop is not None and number > self.stop:
            return 0.0
        if number <= self.after:
            return self.start
        done = min((number - self.after) / self.over, 1.0) if self.over else 1.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def lowest(self, length: int) -> float:
        """Return the least weight in so many epochs or steps, whichever are counted."""
        # Between these it only rises or only falls.
        turns = {0, self.after - 1, self.after, self.after + self.over - 1, length - 1}
        turns |= {self.stop - 1} if self.stop is not None else set()
        return min(self.at(n, n) for n in turns if 0 <= n < length)
