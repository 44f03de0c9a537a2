"""Knowledge distillation as Hinton et al. 2015 define it: match the teacher's softened classes."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_kd.logit_pairs import check_same_shape, in_one_type
from distill_kd.parameters import Parametrized, check, check_choice

Reduction = Literal["batchmean", "mean", "sum"]
SoftTerm = Literal["kl", "cross_entropy"]


class KDLoss(Parametrized):
    r"""Cross entropy with the labels plus the divergence from the teacher's softened classes.

    .. math::
        L = \alpha \, CE(student, targets) + \beta \, T^2 \, KL(p_t^T \| p_s^T),
        \qquad p^T = softmax(logits / T)

    ``T^2`` multiplies the soft term here, always, and never the cross entropy: it keeps the size of
    the soft gradient when the temperature changes. A ``beta`` copied from a code that leaves it out
    must be divided by ``T^2``.

    ``alpha`` weighs the *labels*. Where a recipe's alpha weighs the teacher (RepDistiller ``-r 0.1
    -a 0.9``), give ``alpha=0.1``.

    The soft term needs no labels: without targets it is the whole loss, still times ``beta * T^2``;
    the cross entropy is neither replaced nor made up for. With ``alpha=0`` targets are not looked
    at.

    Args:
        temperature: T > 0, dividing both sides' logits in the soft term.
        alpha: weight of the cross entropy, >= 0.
        beta: weight of the soft term, >= 0; ``None`` means ``1 - alpha``.
        reduction: what is averaged over what. Positions are H, W, ... of dense logits.

            ============= ========================================== ==========================
            name          soft term                                  cross entropy
            ============= ========================================== ==========================
            ``batchmean`` sum over classes and positions, divided    mean over labels
                          by B
            ``mean``      mean over all elements, so K times         mean over labels
                          smaller than per position
            ``sum``       sum                                        sum
            ============= ========================================== ==========================
        label_smoothing: in [0, 1], for the cross entropy only.
        ignore_index: the class index that the cross entropy skips, as in
            ``torch.nn.functional.cross_entropy``. The soft term covers those positions too. Where
            every label is skipped, the cross entropy is 0.
        soft_term: ``"kl"``, or ``"cross_entropy"`` for ``-sum p_t^T log p_s^T``, as the paper
            writes it: larger by the entropy of the teacher, with the same gradient.

    Shape:
        - student, teacher: logits (B, K) or (B, K, H, W, ...); classes stand in dimension 1. The
          teacher may exclude a class by ``-inf``; the student by a low number such as ``-1e4``.
        - targets: class indices (B) or (B, H, W, ...) of any integer type, or class probabilities
          of the shape of the logits and a floating-point type; or ``None``.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    A class that both sides exclude with a logit of ``-inf`` counts nothing.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; logits
            without a class dimension or without elements; targets that fit neither of the shapes.

    Equals, with these parameters:
        - RepDistiller, mdistiller: ``alpha=<weight of CE>, beta=<weight of KD>``.
        - torchdistill's ``KDLoss`` given targets and an alpha above 0: the same names. Without
          either it leaves out ``beta * T^2`` (a slip): ``alpha=0, beta=1 / temperature**2``.
        - cls_KD, where alpha ``a`` weighs the teacher: ``alpha=1 - a, beta=a,
          soft_term="cross_entropy"``.
        - mmrazor, CE + 3 KL: ``alpha=1, beta=3``.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015,
    https://arxiv.org/abs/1503.02531.

    Example:
        >>> import torch
        >>> from distill_kd import KDLoss
        >>> loss = KDLoss(temperature=4.0, alpha=0.1)
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.1904
        >>> round(loss(student, teacher).item(), 4)  # unlabelled: the soft term alone
        0.1557
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        beta: float | None = None,
        reduction: Reduction = "batchmean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        soft_term: SoftTerm = "kl",
    ) -> None:
        super().__init__()
        check(self, "temperature", temperature, 0 < temperature < math.inf, "a finite number > 0")
        check(self, "alpha", alpha, 0 <= alpha < math.inf, "a finite number >= 0")
        if beta is None:
            check(self, "alpha", alpha, alpha <= 1, "<= 1 unless beta is given (beta is 1 - alpha)")
            beta = 1 - alpha
        check(
            self, "beta", beta, 0 <= beta < math.inf, "a finite number >= 0, or None for 1 - alpha"
        )
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check(self, "label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "within [0, 1]")
        check_choice(self, "soft_term", soft_term, get_args(SoftTerm))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.soft_term = soft_term

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        check_same_shape(self, student, teacher)
        _check_logits(student)
        student, teacher = in_one_type(student, teacher)
        soft = self._soft_sum(student, teacher)
        # Factors are put together before they meet a tensor: each such meeting costs a kernel.
        weight = self.beta * self.temperature**2 / self._soft_count(student)
        if targets is None or self.alpha == 0:
            return soft * weight
        count = self._hard_count(student, targets)
        hard = self._hard_sum(student, targets) * (self.alpha / count)
        return torch.add(hard, soft, alpha=weight)

    def _soft_sum(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the summed divergence of the softened classes, without T^2 and without beta."""
        log_student = F.log_softmax(student / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        # A class that the teacher excludes has -inf, and 0 * inf would be NaN.
        log_teacher = log_teacher.clamp(min=torch.finfo(teacher.dtype).min)
        if self.soft_term == "kl":
            return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return -(log_teacher.exp() * log_student).sum()

    def _soft_count(self, student: Tensor) -> int:
        if self.reduction == "sum":
            return 1
        return len(student) if self.reduction == "batchmean" else student.numel()

    def _hard_sum(self, student: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy with the labels, without alpha."""
        _check_targets(student, targets)
        return F.cross_entropy(
            student,
            targets.to(student.dtype if targets.is_floating_point() else torch.int64),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def _hard_count(self, student: Tensor, targets: Tensor) -> Tensor | int:
        if self.reduction == "sum":
            return 1
        if targets.is_floating_point():
            return student.numel() // student.shape[1]
        # Not torch's own mean: that is NaN for a batch whose labels are all ignored.
        return (targets != self.ignore_index).sum(dtype=student.dtype).clamp(min=1)


def _check_logits(student: Tensor) -> None:
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(
            f"KDLoss: logits must have the shape (B, K) or (B, K, ...) and no empty dimension, "
            f"got {tuple(student.shape)}"
        )


def _check_targets(student: Tensor, targets: Tensor) -> None:
    indices = (student.shape[0], *student.shape[2:])
    soft = targets.is_floating_point()
    if tuple(targets.shape) != (tuple(student.shape) if soft else indices):
        raise ValueError(
            f"KDLoss: for logits {tuple(student.shape)} (classes in dimension 1) targets must be "
            f"class indices {indices} of an integer type or class probabilities "
            f"{tuple(student.shape)} of a floating-point type, "
            f"got {tuple(targets.shape)} of {targets.dtype}"
        )
