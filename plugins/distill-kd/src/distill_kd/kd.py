"""Knowledge distillation as Hinton et al. 2015 define it: match the teacher's softened classes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import check, check_choice, check_factor
from distill_kd.logits import (
    RowLoss,
    Rows,
    check_temperature,
    cross_entropy_of,
    divergence,
    log_probabilities,
    standardized,
)

Reduction = Literal["batchmean", "positionmean", "mean", "sum"]
SoftTerm = Literal["kl", "cross_entropy"]
Activation = Literal["softmax", "sigmoid"]


class KDLoss(RowLoss):
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
        reduction: what is averaged over what. Positions are H, W, ... of dense logits, T of texts.

            ================ ========================================= =======================
            name             soft term                                 cross entropy
            ================ ========================================= =======================
            ``batchmean``    sum over classes and positions, divided   mean over labels
                             by B
            ``positionmean`` sum over classes, mean over the positions mean over labels
                             that count
            ``mean``         mean over all elements, so K times        mean over labels
                             smaller than per position
            ``sum``          sum                                       sum
            ================ ========================================= =======================
        label_smoothing: in [0, 1], for the cross entropy only.
        ignore_index: the class index that the cross entropy skips, as in
            ``torch.nn.functional.cross_entropy``. Where every label is skipped, it is 0.
        soft_term: ``"kl"``, or ``"cross_entropy"`` for ``-sum p_t^T log p_s^T``, as the paper
            writes it: larger by the entropy of the teacher, with the same gradient.
        ignore_soft: leave positions with the ``ignore_index`` out of the soft term too, as those of
            a language model's prompts. A ``mask`` leaves them out of both.
        standardize: match logits less their mean, in units of their standard deviation; the cross
            entropy takes them as they are. Logits must be finite.
        activation: ``"softmax"``; or ``"sigmoid"`` for images with several labels: each class is
            told by itself, the soft term sums the divergences of K yes-or-no questions, and the
            hard one is the binary cross entropy with targets of 0 and 1, mean over classes.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K), (B, K, H, W, ...) with classes in dimension 1, or (B, T,
          V) with classes last. The teacher may exclude a class by ``-inf``; the student by a low
          number such as ``-1e4``.
        - targets: class indices of any integer type, (B), (B, H, W, ...) or (B, T), or class
          probabilities of the shape of the logits (several labels of 0 and 1 share 1 in equal
          parts); or ``None``.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    A class that both sides exclude with a logit of ``-inf`` counts nothing. Of more than 2**24
    logits, parts are computed one after another, and again for the backward, to bound memory.

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
        - the authors of logit standardisation (Sun et al., CVPR 2024,
          https://arxiv.org/abs/2403.01427), on CIFAR-100: ``standardize=True, temperature=2,
          alpha=0.1, beta=9``.
        - Tf-KD's self-training (Yuan et al., CVPR 2020, https://arxiv.org/abs/1909.11723) with
          alpha ``a`` and multiplier ``m``: ``alpha=1 - a, beta=a * m, reduction="mean"``.

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
        ignore_soft: bool = False,
        standardize: bool = False,
        activation: Activation = "softmax",
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
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check(self, "label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "within [0, 1]")
        check_choice(self, "soft_term", soft_term, get_args(SoftTerm))
        check_choice(self, "activation", activation, get_args(Activation))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.soft_term = soft_term
        self.ignore_soft = ignore_soft
        self.standardize = standardize
        self.activation = activation

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        if self.alpha == 0 and not self.ignore_soft:
            targets = None
        rows = self.rows(student, teacher, targets, mask)
        if self.activation == "sigmoid" and rows.labels is not None:
            raise ValueError(
                "KDLoss: activation sigmoid needs targets of 0 and 1 for each class, of the shape "
                f"{tuple(student.shape)}, got class indices {tuple(rows.labels.shape)}"
            )
        masked = None if mask is None else mask.reshape(-1).bool()
        matched = rows if self.ignore_soft else replace(rows, counted=masked)
        of_teacher, *of_labels = self.losses_of(matched).unbind(1)
        soft = matched.total(of_teacher) * (self.beta * self.temperature**2)
        soft = soft / self._soft_count(student, matched)
        if not of_labels:
            return soft
        hard = rows.total(of_labels[0]) * self.alpha
        return soft + (hard if self.reduction == "sum" else hard / rows.count())

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the divergence of the softened classes and the cross entropy of each row, (N, 2).

        Both without factors; of rows without labels the divergence alone, (N, 1).
        """
        losses = [self._soft(rows.student, rows.teacher)]
        if self.alpha != 0 and (rows.labels is not None or rows.soft is not None):
            losses.append(self._hard(rows))
        return torch.stack(losses, 1)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        if self.activation == "sigmoid":
            return self._of_each_class(student / self.temperature, teacher / self.temperature)
        log_student = log_probabilities(student, self.temperature)
        log_teacher = log_probabilities(teacher, self.temperature)
        if self.soft_term == "kl":
            return divergence(log_student, log_teacher)
        return -(log_teacher.exp() * log_student).sum(1)

    def _of_each_class(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the sum over classes of what tells one yes-or-no answer from another, (N)."""
        teacher = teacher.clamp_min(torch.finfo(teacher.dtype).min)  # 0 * -inf would be NaN
        found = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
        if self.soft_term == "kl":
            found = found - F.binary_cross_entropy_with_logits(
                teacher, teacher.sigmoid(), reduction="none"
            )
        return found.sum(1)

    def _hard(self, rows: Rows) -> Tensor:
        if self.activation == "softmax":
            return cross_entropy_of(rows.student.log_softmax(1), rows, self.label_smoothing)
        assert rows.soft is not None, "class indices have been refused"
        smoothed = torch.lerp(rows.soft, torch.full_like(rows.soft, 0.5), self.label_smoothing)
        found = F.binary_cross_entropy_with_logits(rows.student, smoothed, reduction="none")
        return found.mean(1)

    def _soft_count(self, student: Tensor, matched: Rows) -> Tensor | int:
        if self.reduction == "positionmean":
            return matched.count()
        if self.reduction == "mean":
            return matched.count() * matched.student.shape[1]
        return len(student) if self.reduction == "batchmean" else 1
