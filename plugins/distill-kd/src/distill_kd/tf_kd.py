"""Teacher-free KD, Yuan et al. 2020: a teacher made by hand of the label alone."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from distill.parameters import check, check_choice, check_factor
from distill_kd.logits import (
    RowLoss,
    Rows,
    check_temperature,
    cross_entropy_of,
    divergence,
    log_probabilities,
)
from distill_kd.reduction import Reduction, divisor


class VirtualTeacherLoss(RowLoss):
    r"""Cross entropy plus the divergence from a teacher that is nothing but the label, softened.

    .. math::
        L = \alpha \, CE(student, targets) + \beta \, KL(softmax(u / T) \| softmax(student)), \qquad
        u_k = \begin{cases} c & k = y \\ (1 - c) / (K - 1) & \text{else} \end{cases}

    T divides the *probabilities* u, which lie within 0 and 1, so that ``softmax(u / T)`` is nearly
    uniform; the student is not softened, and nothing is multiplied by ``T^2``. This is the form
    that the paper calls regularization: no network teaches. It has the gradient of smoothed
    labels, of which it is a kind. The other form, self-training, is ``KDLoss`` with a trained copy
    of the student for a teacher.

    ``alpha`` weighs the *labels*, as in ``KDLoss``. Where the authors' alpha ``a`` and multiplier
    ``m`` weigh the virtual teacher, give ``alpha=1 - a, beta=a * m``.

    Args:
        temperature: T > 0, dividing u.
        alpha: weight of the cross entropy with the labels, >= 0.
        beta: weight of the virtual teacher, >= 0; ``None`` means ``1 - alpha``.
        correct_probability: c in [0, 1], what u gives the label.
        reduction: what the virtual teacher's sum is divided by; the cross entropy is a mean over
            labels.

            ================ ==========================================================
            name             divisor
            ================ ==========================================================
            ``batchmean``    B: sum over classes, and over the positions of dense logits
            ``positionmean`` positions that count
            ``mean``         elements that count, so K times smaller: the authors',
                             who make up for it by a multiplier, 100 for CIFAR-100
            ================ ==========================================================
        ignore_index: the label of positions that do not count.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student: logits (B, K), K > 1. Of dense logits (B, K, H, W) and of texts (B, T, V) each
          position is a sample.
        - targets: class indices of any integer type, (B), (B, H, W) or (B, T); or class
          probabilities of the logits' shape (MixUp, CutMix, smoothed labels), whose virtual teacher
          is the mixture of those of the labels.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if the logits are.

    Raises:
        ValueError: a parameter out of range; one class; targets that fit neither of the shapes.

    Equals the authors' ``loss_kd_regularization`` with ``reduction="mean"`` and weights as above;
    on CIFAR-100 theirs for ResNet-18 is the default here.

    Source: Yuan, Tay, Li, Wang, Feng, *Revisiting Knowledge Distillation via Label Smoothing
    Regularization*, CVPR 2020, https://arxiv.org/abs/1909.11723; code
    https://github.com/yuanli2333/Teacher-free-Knowledge-Distillation.

    Example:
        >>> import torch
        >>> from distill_kd.tf_kd import VirtualTeacherLoss
        >>> loss = VirtualTeacherLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> value = loss(student, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.3685
    """

    def __init__(
        self,
        temperature: float = 20.0,
        alpha: float = 0.9,
        beta: float | None = None,
        correct_probability: float = 0.99,
        reduction: Reduction = "batchmean",
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_temperature(self, temperature)
        check_factor(self, "alpha", alpha)
        if beta is None:
            check(self, "alpha", alpha, alpha <= 1, "<= 1 unless beta is given (beta is 1 - alpha)")
            beta = 1 - alpha
        fits = 0 <= beta < math.inf
        check(self, "beta", beta, fits, "a finite number >= 0, or None for 1 - alpha")
        sure = correct_probability
        check(self, "correct_probability", sure, 0 <= sure <= 1, "within [0, 1]")
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.correct_probability = correct_probability
        self.reduction = reduction

    def forward(self, student: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        rows = self.rows(student, student, targets, mask).labelled(self)
        virtual, hard = self.losses_of(rows).unbind(1)
        virtual = rows.total(virtual) / divisor(self.reduction, rows, len(student))
        return torch.add(virtual * self.beta, rows.mean(hard), alpha=self.alpha)

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the divergence and the cross entropy of each row, without factors, (N, 2)."""
        classes = rows.student.shape[1]
        if classes < 2:
            raise ValueError(f"VirtualTeacherLoss: needs two or more classes, got {classes}")
        log_student = log_probabilities(rows.student)
        label, other = self._softened(classes)
        virtual = rows.probabilities(log_student.dtype) * (label - other) + other
        log_virtual = virtual.log().clamp_min(torch.finfo(virtual.dtype).min)
        return torch.stack(
            [divergence(log_student, log_virtual), cross_entropy_of(log_student, rows)], 1
        )

    def _softened(self, classes: int) -> tuple[float, float]:
        """Return what softmax(u / T) gives the label, and each other class."""
        label, other = self.correct_probability, (1 - self.correct_probability) / (classes - 1)
        highest = max(label, other)
        label, other = (math.exp((u - highest) / self.temperature) for u in (label, other))
        total = label + (classes - 1) * other
        return label / total, other / total
