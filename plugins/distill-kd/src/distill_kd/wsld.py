"""WSLD, Zhou et al. 2021: the teacher counts less where the student already knows the label."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from distill.parameters import check_choice, check_factor
from distill_kd.logits import (
    RowLoss,
    Rows,
    check_temperature,
    cross_entropy_of,
    divergence,
    log_probabilities,
    standardized,
)

SoftTerm = Literal["cross_entropy", "kl"]

SMALLEST_CROSS_ENTROPY = 1e-7
"""Added to the teacher's cross entropy that is divided by, as the authors do."""


class WSLDLoss(RowLoss):
    r"""Cross entropy with the teacher's softened classes, weighed for each sample.

    .. math::
        L = \alpha T^2 \, \frac{1}{B} \sum_b w_b \, H(p_t^T, p_s^T), \qquad
        w_b = 1 - \exp\left( -\frac{CE_b(student)}{CE_b(teacher) + 10^{-7}} \right)

    ``CE_b`` is the cross entropy of a sample with its label at temperature 1, and H that of the
    student's softened classes with the teacher's. The weights are constants: no gradient flows
    through them. A sample that the student has learned well gets nearly none of the teacher, whose
    softened classes would undo it.

    The cross entropy with the labels is a term of its own, of weight 1.

    Args:
        temperature: T > 0, dividing both sides' logits in H.
        alpha: weight, >= 0; 2.25 on CIFAR-100, and 2.5 with T = 2 on ImageNet.
        soft_term: ``"cross_entropy"`` as published, or ``"kl"``, smaller by the teacher's entropy
            times the weight: the gradient is the same, and equal logits give 0.
        ignore_index: the label of positions that do not count.
        standardize: match logits less their mean, in units of their standard deviation; the
            weights are those of the logits as they are. Logits must be finite.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K). The teacher may exclude a class by ``-inf``, the student
          by a low number such as ``-1e4``. Of dense logits (B, K, H, W) and of texts (B, T, V) each
          position is a sample.
        - targets: class indices of any integer type, (B), (B, H, W) or (B, T); or class
          probabilities of the logits' shape (MixUp, CutMix, smoothed labels; several labels of 0
          and 1 share 1 in equal parts), with which both cross entropies of the weight are taken.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, the mean over positions that count, computed in float32, or in float64 if
          one of the logits is. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; targets that
            fit neither of the shapes.

    Equals the authors' code, cls_KD's and mmrazor's ``WSLD``, each less its cross entropy.

    Source: Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, *Rethinking Soft Labels for Knowledge
    Distillation: A Bias-Variance Tradeoff Perspective*, ICLR 2021,
    https://arxiv.org/abs/2102.00650.

    Example:
        >>> import torch
        >>> from distill_kd.wsld import WSLDLoss
        >>> loss = WSLDLoss(temperature=2.0, alpha=2.5)
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        4.3619
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 2.25,
        soft_term: SoftTerm = "cross_entropy",
        ignore_index: int = -100,
        standardize: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_temperature(self, temperature)
        check_factor(self, "alpha", alpha)
        check_choice(self, "soft_term", soft_term, get_args(SoftTerm))
        self.temperature = temperature
        self.alpha = alpha
        self.soft_term = soft_term
        self.standardize = standardize

    def forward(
        self, student: Tensor, teacher: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        rows = self.rows(student, teacher, targets, mask).labelled(self)
        return rows.mean(self.losses_of(rows)) * (self.alpha * self.temperature**2)

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the weighted cross entropy, or divergence, of each row, (N)."""
        return self._weights(rows) * self._soft(rows.student, rows.teacher)

    @torch.no_grad()
    def _weights(self, rows: Rows) -> Tensor:
        """Return what the teacher counts in each row, (N), from 0 to 1."""
        student, teacher = (
            cross_entropy_of(log_probabilities(logits), rows)
            for logits in (rows.student, rows.teacher)
        )
        # Rounding may put a cross entropy below 0.
        ratio = student.clamp_min(0) / (teacher.clamp_min(0) + SMALLEST_CROSS_ENTROPY)
        return -torch.expm1(-ratio)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        log_student = log_probabilities(student, self.temperature)
        log_teacher = log_probabilities(teacher, self.temperature)
        if self.soft_term == "kl":
            return divergence(log_student, log_teacher)
        return -(log_teacher.exp() * log_student).sum(1)
