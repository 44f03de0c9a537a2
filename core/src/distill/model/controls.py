"""What stands in for a teacher's output, so that a student gains nothing by its knowledge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from distill import randomness
from distill.errors import DistillError
from distill.global_batch import gather
from distill.model.wiring import describe

OutputControl = Callable[[torch.Tensor, Any], torch.Tensor]
"""Takes a teacher's logits and the batch's targets; gives what stands in for the logits."""

LOGITS = ("logits", "out")
"""What the part of an output with several parts is called that is replaced."""


class ControlError(DistillError):
    """A control cannot stand in for what the teacher in ``role`` gives."""

    def __init__(self, message: str, role: str = ""):
        self.role = role
        super().__init__(message)


class ShuffledClasses:
    """Gives the logits to other classes, by one permutation that leaves no class in its place.

    It depends on the seed and the number of classes alone: all teachers and stages share it. How
    sure the teacher is of each sample stays; what it is sure of is wrong.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self, logits: torch.Tensor, targets: Any) -> torch.Tensor:
        """Return the logits (B, K), (B, T, K) or (B, K, H, W) with their classes permuted.

        Raises:
            ControlError: if these are no logits of two classes or more.
        """
        dim = _class_dim(logits)
        if len(self._order) != logits.shape[dim] or self._order.device != logits.device:
            self._order = derangement(logits.shape[dim], self._seed).to(logits.device)
        return logits.index_select(dim, self._order)


class SmoothedLabels:
    """Gives the logs of the labels, smoothed as much as the teacher is in doubt of them.

    A label's class has the probability 1 - eps and each other one eps / (K - 1); soft labels t give
    t (1 - eps) + (1 - t) eps / (K - 1). With the means over the samples of all processes of
    p = sum_k t_k teacher_k and q = sum_k t_k^2 (1 for a class's index),
    eps = (q - p) (K - 1) / (K q - 1): at temperature 1 the labels' mean probability is the
    teacher's. For indices eps is the mean of 1 - p. Labels outside 0 ... K - 1, such as -100, are
    left out of the means, and all classes are alike there.
    """

    def __call__(self, logits: torch.Tensor, targets: Any) -> torch.Tensor:
        """Return logits as those given: (B, K), (B, T, K) or (B, K, H, W).

        Args:
            logits: the teacher's.
            targets: int64 (B), (B, T) or (B, H, W), or soft labels as the logits; for V views of
                each sample, side by side, with B in place of B * V.

        Raises:
            ControlError: if these are no such logits and labels.
        """
        dim = _class_dim(logits)
        rows = logits.movedim(dim, -1).to(torch.promote_types(logits.dtype, torch.float32))
        classes = rows.shape[-1]
        labels, known = _soft(targets, rows, dim)
        right = (rows.softmax(-1) * labels).sum(-1)[..., None]
        square = labels.square().sum(-1)[..., None]
        each = torch.cat([right, square, torch.ones_like(right)], -1) * known
        right, square, count = gather(each.reshape(len(each), -1, 3).sum(1)).sum(0)
        eps = (square - right) * (classes - 1) / (classes * square - count)
        least = torch.finfo(torch.float32).eps
        eps = eps.nan_to_num(0.0).clamp(least, 1 - least)
        smoothed = labels * (1 - eps) + (1 - labels) * eps / (classes - 1)
        smoothed = smoothed.where(known, torch.full_like(smoothed, 1 / classes))
        stand_in: torch.Tensor = smoothed.log().movedim(-1, dim).to(logits.dtype)
        return stand_in


def output_control(name: str | None, seed: int) -> OutputControl | None:
    """Return what stands in for a teacher's output; ``None`` where a control does not act on it."""
    if name == "shuffled_classes":
        return ShuffledClasses(seed)
    return SmoothedLabels() if name == "label_smoothing" else None


def controlled(control: OutputControl, output: Any, targets: Any) -> Any:
    """Return a model's output with its logits, or its part called so, replaced.

    Raises:
        ControlError: if there are no logits, or they and the targets do not suit the control.
    """
    if isinstance(output, Mapping):
        for name in LOGITS:
            if name in output:
                return {**output, name: controlled(control, output[name], targets)}
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        parts = " or ".join(LOGITS)
        raise ControlError(
            f"it acts on logits, and the teacher gives {describe(output)}; a part of an output is "
            f"found by the name {parts}. For this teacher there is random_teacher"
        )
    return control(output, targets)


def derangement(size: int, seed: int) -> torch.Tensor:
    """Return a permutation of 0 ... size - 1 with no number in its place, int64 (size).

    Every such permutation is as likely as any other; there is one from size 2 on.
    """
    generator = torch.Generator().manual_seed(randomness.derive(seed, "shuffled classes", size))
    places = torch.arange(size)
    while True:  # 2.7 times on average
        order = torch.randperm(size, generator=generator)
        if not (order == places).any():
            return order


def _class_dim(logits: torch.Tensor) -> int:
    """Return where the classes of (B, K), (B, T, K) and (B, K, ...) stand."""
    dim = 2 if logits.dim() == 3 else 1
    if logits.dim() < 2 or logits.shape[dim] < 2:
        given = describe(logits)
        raise ControlError(f"it acts on logits (B, K) of two classes or more, and is given {given}")
    return dim


def _soft(targets: Any, rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels as probabilities (..., K), and where there are any, bool (..., 1)."""
    if isinstance(targets, torch.Tensor) and 0 < len(targets) < len(rows):
        targets = targets.repeat_interleave(len(rows) // len(targets), 0)
    if isinstance(targets, torch.Tensor) and targets.is_floating_point():
        labels = targets.movedim(dim, -1) if targets.dim() == rows.dim() else targets
        if labels.shape == rows.shape:
            return labels.to(rows.dtype), torch.ones_like(rows[..., :1], dtype=torch.bool)
    elif isinstance(targets, torch.Tensor) and targets.shape == rows.shape[:-1]:
        index = targets.long()[..., None]
        known = (index >= 0) & (index < rows.shape[-1])
        return torch.zeros_like(rows).scatter_(-1, index.where(known, 0), 1.0), known
    what = f"{targets.dtype} " if isinstance(targets, torch.Tensor) else ""
    raise ControlError(
        f"label_smoothing needs labels: integers {tuple(rows.shape[:-1])}, or probabilities of the "
        f"classes; the targets are {what}{describe(targets)}. Without labels there are "
        "shuffled_classes and random_teacher"
    )
