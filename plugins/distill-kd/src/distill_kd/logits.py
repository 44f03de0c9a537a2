"""What losses on logits share: layouts, labels hard and soft, masks, precision, and bounded memory.

Every loss sees rows: logits (N, K), one row for each position that has a label, whatever the layout
they came in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill import once_differentiable
from distill.parameters import Parametrized, check_choice, check_positive

SoftTargets = Literal["argmax", "error"]

AT_ONCE = 2**24
"""Logits that are looked at together; of more, parts are computed again for the backward."""
SMALLEST_DEVIATION = 1e-7
"""Added to a standard deviation that logits are divided by, as the authors do."""


@dataclass(frozen=True)
class Rows:
    """The positions of a batch as rows.

    Attributes:
        student: logits (N, K), of the type that they came in.
        teacher: likewise; without gradient.
        labels: class indices, int64 (N), within 0 and K - 1; ``None`` without hard labels.
        soft: class probabilities (N, K), or several labels of 0 and 1; ``None`` without.
        counted: bool (N), which rows count; ``None`` for all.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None = None
    soft: Tensor | None = None
    counted: Tensor | None = None

    def count(self) -> Tensor | int:
        """Return how many rows count, at least 1."""
        if self.counted is None:
            return len(self.student)
        return self.counted.sum().clamp_min(1)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values (N) over the rows that count, 0 if none does."""
        return self.total(values) / self.count()

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of values (N) over the rows that count."""
        # Not a product: what does not count may be infinite.
        return (values if self.counted is None else values.where(self.counted, 0.0)).sum()

    def classes(self) -> Tensor:
        """Return a class for each row, int64 (N): its label, or the likeliest of soft ones."""
        if self.labels is not None:
            return self.labels
        assert self.soft is not None, "asked of rows without labels"
        return self.soft.argmax(1)

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        """Return the labels as probabilities (N, K): several labels share 1 in equal parts."""
        if self.soft is not None:
            soft = self.soft.to(dtype)
            return soft / soft.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        assert self.labels is not None, "asked of rows without labels"
        known = torch.zeros(self.student.shape, dtype=dtype, device=self.student.device)
        return known.scatter_(1, self.labels[:, None], 1.0)

    def wide(self) -> Rows:
        """Return the rows in the wider of the logits' types, float32 at least.

        Logits of rows that do not count become 0, since the gradient of what is not finite is not 0
        however little it counts.
        """
        # Half precision loses small probabilities, and T^2 then multiplies the error.
        dtype = torch.promote_types(self.student.dtype, self.teacher.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        soft = None if self.soft is None else self.soft.to(dtype)
        student, teacher = self.student.to(dtype), self.teacher.to(dtype)
        if self.counted is not None:
            kept = self.counted[:, None]
            student, teacher = student.where(kept, 0.0), teacher.where(kept, 0.0)
        return Rows(student, teacher, self.labels, soft, self.counted)

    def labelled(self, owner: object) -> Rows:
        """Return the rows, which have labels.

        Raises:
            ValueError: if they have none.
        """
        if self.labels is None and self.soft is None:
            raise ValueError(
                f"{type(owner).__name__} needs targets, got None; KDLoss does without labels"
            )
        return self

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """Return what a function makes of each of the tensors."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Rows(*(None if t is None else change(t) for t in tensors))  # type: ignore[arg-type]

    def part(self, some: slice) -> Rows:
        """Return some of the rows."""
        return self.each(lambda tensor: tensor[some])


class LogitLoss(Parametrized):
    """A loss on the logits of student and teacher.

    Logits are (B, K), (B, K, H, W) and more, with the classes in dimension 1, or (B, T, V), with
    the classes last. ``class_dim`` says otherwise, such as 1 for (B, K, L).

    Args:
        ignore_index: the label of positions that do not count.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.
    """

    def __init__(self, ignore_index: int = -100, class_dim: int | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.class_dim = class_dim

    def rows(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Rows:
        """Return the positions of a batch as rows, the teacher's detached.

        Args:
            student: logits.
            teacher: logits of the same shape.
            targets: class indices of any integer type, of the logits' shape without classes; or
                class probabilities of the logits' shape (MixUp, CutMix, smoothed labels), or
                several labels of 0 and 1.
            mask: positions that count, of the logits' shape without classes; others than 0 do.

        Raises:
            ValueError: shapes that do not fit.
        """
        check_same_shape(self, student, teacher)
        dim = self._classes_in(student)
        positions = torch.Size((*student.shape[:dim], *student.shape[dim + 1 :]))
        labels = soft = counted = None
        if mask is not None:
            counted = _positions(self, "mask", mask, positions).bool()
        if targets is not None and targets.shape == student.shape:
            soft = class_rows(targets, dim)
        elif targets is not None:
            labels = _positions(self, "targets", targets, positions, student.shape).long()
            kept = labels != self.ignore_index
            labels = labels.where(kept, 0)
            counted = kept if counted is None else counted & kept
        teacher = teacher.detach()
        return Rows(class_rows(student, dim), class_rows(teacher, dim), labels, soft, counted)

    def _classes_in(self, logits: Tensor) -> int:
        dim = self.class_dim
        if dim is None:
            dim = 2 if logits.dim() == 3 else 1
        if logits.dim() < 2 or logits.numel() == 0 or not -logits.dim() <= dim < logits.dim():
            raise ValueError(
                f"{type(self).__name__}: logits must have the shape (B, K), (B, K, H, W) or "
                f"(B, T, V), with classes in dimension {dim} and no empty dimension, got "
                f"{tuple(logits.shape)}"
            )
        return dim % logits.dim()


class RowLoss(LogitLoss):
    """A loss that is a mean over rows, each by itself.

    Memory: of more than 2**24 logits, parts are looked at one after another and computed again for
    the backward, so that beyond logits and their gradient it takes some hundred MB.
    """

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the loss of each row (N, ...), of logits in float32 or wider."""
        raise NotImplementedError

    def losses_of(self, rows: Rows) -> Tensor:
        """Return the loss of each row (N, ...), part by part if they are many."""
        if rows.student.numel() <= AT_ONCE or len(rows.student) == 1:
            return self.row_losses(rows.wide())
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found: Tensor = _InParts.apply(self, rows, rows.student, rows.teacher, *own)
        return found


class _InParts(torch.autograd.Function):
    """Losses of parts of the rows; the gradient of each goes where that of all is to be."""

    @staticmethod
    def forward(
        ctx: Any, loss: RowLoss, rows: Rows, student: Tensor, teacher: Tensor, *own: Tensor
    ) -> Tensor:
        ctx.loss = loss
        ctx.rows = replace(rows, student=student.detach(), teacher=teacher.detach())
        ctx.save_for_backward(*own)
        return torch.cat([loss.row_losses(ctx.rows.part(some).wide()) for some in _parts(student)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        own, whole = ctx.saved_tensors, {}
        # What stands for the teacher may train too, such as a weak head of the student.
        for name, needed in zip(("student", "teacher"), ctx.needs_input_grad[2:4], strict=True):
            if needed:
                whole[name] = torch.empty_like(getattr(ctx.rows, name))
        of_own = [torch.zeros_like(parameter) for parameter in own]
        for some in _parts(ctx.rows.student):
            rows = ctx.rows.part(some)
            leaves = {name: getattr(rows, name).detach().requires_grad_() for name in whole}
            with torch.enable_grad():
                losses = ctx.loss.row_losses(replace(rows, **leaves).wide())
            found = torch.autograd.grad(
                losses,
                [*leaves.values(), *own],
                outer[some],
                allow_unused=True,
                materialize_grads=True,
            )
            for total, part in zip(whole.values(), found, strict=False):
                total[some] = part
            for total, part in zip(of_own, found[len(whole) :], strict=True):
                total += part
        return (None, None, whole.get("student"), whole.get("teacher"), *of_own)


def _parts(logits: Tensor) -> list[slice]:
    each = max(1, AT_ONCE // logits.shape[1])
    return [slice(start, start + each) for start in range(0, len(logits), each)]


class LabelledLoss(RowLoss):
    """A mean over the rows that count, of a method that needs one label for each.

    Args:
        soft_targets: what to do with class probabilities in place of labels: ``"argmax"`` takes
            the likeliest class, ``"error"`` refuses them.
        ignore_index: the label of positions that do not count.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.
    """

    def __init__(
        self,
        soft_targets: SoftTargets = "argmax",
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_choice(self, "soft_targets", soft_targets, get_args(SoftTargets))
        self.soft_targets = soft_targets

    def forward(
        self, student: Tensor, teacher: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        rows = self.rows(student, teacher, targets, mask).labelled(self)
        if rows.soft is not None and self.soft_targets == "error":
            raise ValueError(
                f"{type(self).__name__} needs one label for each position, got class probabilities "
                f"{tuple(targets.shape)} (of MixUp, CutMix or smoothed labels); soft_targets: "
                "argmax takes the likeliest class"
            )
        return rows.mean(self.losses_of(rows))


def check_temperature(owner: object, temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0."""
    check_positive(owner, "temperature", temperature)


def check_same_shape(owner: object, student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of different shapes.

    Raises:
        ValueError: naming both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{type(owner).__name__}: student and teacher logits must have the same shape, "
            f"got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )


def class_rows(logits: Tensor, dim: int) -> Tensor:
    """Return logits as rows (N, K), with the classes of dimension ``dim``."""
    if logits.dim() == 2 and dim == 1:  # as nearly always, without the price of views
        return logits
    return logits.movedim(dim, -1).reshape(-1, logits.shape[dim])


def standardized(logits: Tensor) -> Tensor:
    r"""Return logits (N, K) less their mean, divided by 1e-7 plus their standard deviation.

    The deviation is that of a sample, divided by K - 1. Equal logits become 0, without a gradient
    through the deviation.

    Source: Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024,
    https://arxiv.org/abs/2403.01427.
    """
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(1, logits.shape[1] - 1)
    deviation = variance.clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    return centred / (deviation + SMALLEST_DEVIATION)


def log_probabilities(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) of rows (N, K), finite where logits are -inf."""
    found = (logits / temperature).log_softmax(1)
    # A class that is excluded has -inf, and 0 * inf would be NaN.
    return found.clamp_min(torch.finfo(logits.dtype).min)


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of rows (N, K) of log probabilities, (N)."""
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1)


def cross_entropy_of(log_student: Tensor, rows: Rows, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of log probabilities (N, K) with labels hard or soft, (N)."""
    if rows.labels is not None:
        found = F.nll_loss(log_student, rows.labels, reduction="none")
    else:
        found = -(rows.probabilities(log_student.dtype) * log_student).sum(1)
    if smoothing == 0:
        return found
    return torch.lerp(found, -log_student.mean(1), smoothing)


def _positions(
    owner: object,
    name: str,
    values: Tensor,
    positions: torch.Size,
    logits: torch.Size | None = None,
) -> Tensor:
    """Return labels or a mask of each position as (N).

    Raises:
        ValueError: if there is not one for each.
    """
    if values.shape != positions or (logits is not None and values.is_floating_point()):
        soft = f", or class probabilities {tuple(logits)}" if logits is not None else ""
        kind = "class indices" if logits is not None else "numbers"
        raise ValueError(
            f"{type(owner).__name__}: {name} must be {kind} {tuple(positions)}{soft}; got "
            f"{tuple(values.shape)} of {values.dtype}"
        )
    return values.reshape(-1)
