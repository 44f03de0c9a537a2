"""Jensen-Shannon divergence, generalized: from the teacher's KL to the student's, for texts."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.parameters import check, check_choice
from distill_kd.logits import (
    RowLoss,
    Rows,
    check_temperature,
    divergence,
    log_probabilities,
    standardized,
)

Reduction = Literal["positionmean", "batchmean", "sum"]


class JensenShannonLoss(RowLoss):
    r"""How far teacher and student are from a mixture of both.

    .. math::
        L = \beta \, KL(p_t \| m) + (1 - \beta) \, KL(p_s \| m),
        \qquad m = \beta \, p_t + (1 - \beta) \, p_s, \quad p = softmax(logits / T)

    At both ends this is 0. There the loss is what it comes to near them, divided by :math:`\beta`
    and by :math:`1 - \beta`: for ``beta=0`` the forward divergence :math:`KL(p_t \| p_s)`, which
    asks the student to cover all that the teacher finds likely; for ``beta=1`` the reverse one,
    :math:`KL(p_s \| p_t)`, which asks it to keep to that. So ``beta=0.01`` gives about a hundredth
    of what ``beta=0`` gives. In between the loss is at most :math:`\log 2`.

    Labels are not in it but for positions that they leave out: prompts and padding. A causal
    language model's logits at a position belong to the next token: wire both shifted alike.

    Args:
        beta: from 0 to 1, the teacher's part of the mixture.
        temperature: T > 0, dividing both sides' logits.
        scale_by_temperature: whether to multiply by ``T^2``, which keeps the size of the gradient
            when the temperature changes, as ``KDLoss`` does. TRL does not, and this does not unless
            told.
        reduction: ``"positionmean"``, the mean over the positions that count; ``"batchmean"``, the
            sum over positions divided by B; or ``"sum"``.
        ignore_index: the label of positions that do not count, where targets are wired.
        standardize: compare logits less their mean, in units of their standard deviation, which
            must be finite.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, T, V) with classes last, (B, K), or (B, K, H, W, ...) with
          classes in dimension 1. The teacher may exclude a class by ``-inf``, for ``beta`` below
          1: the reverse divergence from what the teacher excludes is infinite.
        - targets: class indices of any integer type, (B, T), (B) or (B, H, W, ...), looked at only
          for positions to ignore; not needed.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    Of more than 2**24 logits, parts are computed one after another, and again for the backward, to
    bound memory.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; logits
            without classes or elements; targets or a mask that do not fit.

    Equals, with the same beta and temperature:
        - TRL's ``GKDTrainer.generalized_jsd_loss`` of ``reduction="batchmean"``, which is the mean
          over the positions whose label is not -100. Its first versions weighed the other way
          round, and mixed logarithms.
        - ``KDLoss`` without labels: ``beta=0, scale_by_temperature=True``.

    Source: Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes*, ICLR 2024, https://arxiv.org/abs/2306.13649.

    Example:
        >>> import torch
        >>> from distill_kd.jensen_shannon import JensenShannonLoss
        >>> loss = JensenShannonLoss(beta=0.5)
        >>> student = torch.tensor([[[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]]], requires_grad=True)
        >>> teacher = torch.tensor([[[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]]])
        >>> value = loss(student, teacher)
        >>> value.backward()
        >>> round(value.item(), 4)
        0.0437
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature: bool = False,
        reduction: Reduction = "positionmean",
        ignore_index: int = -100,
        standardize: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check(self, "beta", beta, 0 <= beta <= 1, "within [0, 1]")
        check_temperature(self, temperature)
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.beta = beta
        self.temperature = temperature
        self.scale_by_temperature = scale_by_temperature
        self.reduction = reduction
        self.standardize = standardize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        rows = self.rows(student, teacher, targets, mask)
        total = rows.total(self.losses_of(rows))
        if self.scale_by_temperature:
            total = total * self.temperature**2
        if self.reduction == "sum":
            return total
        return total / (len(student) if self.reduction == "batchmean" else rows.count())

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the divergence of each row, (N)."""
        sides = rows.student, rows.teacher
        if self.standardize:
            sides = standardized(rows.student), standardized(rows.teacher)
        student, teacher = (log_probabilities(side, self.temperature) for side in sides)
        if self.beta == 0:
            return divergence(student, teacher)
        if self.beta == 1:
            return divergence(teacher, student)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        of_teacher, of_student = divergence(mixture, teacher), divergence(mixture, student)
        return self.beta * of_teacher + (1 - self.beta) * of_student
