"""The squared distance of logits, Ba and Caruana 2014: what was matched before temperatures."""

from __future__ import annotations

import math
from typing import get_args

from torch import Tensor

from distill.parameters import check_choice
from distill_kd.logits import RowLoss, Rows, standardized
from distill_kd.reduction import Reduction, divisor


class LogitL2Loss(RowLoss):
    r"""Squared distance of the logits of student and teacher.

    .. math::
        L = \frac{1}{n} \sum \| z_s - z_t \|^2

    It is what knowledge distillation becomes at a high temperature, for logits less their mean;
    here their mean and their size count too. Labels are not in it: the cross entropy, if wanted, is
    a term of its own.

    Args:
        reduction: what the sum is divided by. Positions are H, W, ... of dense logits, T of texts.

            ================ =======================================================
            name             n
            ================ =======================================================
            ``mean``         number of elements that count, as torch's ``MSELoss``
            ``positionmean`` number of positions that count
            ``batchmean``    B; the paper's loss is half of this one
            ================ =======================================================
        ignore_index: the label of positions that do not count, where targets are wired.
        standardize: take logits less their mean, in units of their standard deviation, which must
            be finite. So the paper does, but over the training set.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K), (B, K, H, W) with classes in dimension 1, or (B, T, V)
          with classes last. A class that the teacher excludes by ``-inf`` has distance 0.
        - targets: class indices, looked at only for positions to ignore; not needed.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes.

    Source: Ba, Caruana, *Do Deep Nets Really Need to be Deep?*, NeurIPS 2014,
    https://arxiv.org/abs/1312.6184.

    Example:
        >>> import torch
        >>> from distill_kd.l2 import LogitL2Loss
        >>> loss = LogitL2Loss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher)
        >>> value.backward()
        >>> round(value.item(), 4)
        0.8333
    """

    def __init__(
        self,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        standardize: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_choice(self, "reduction", reduction, get_args(Reduction))
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
        return rows.total(self.losses_of(rows)) / divisor(self.reduction, rows, len(student))

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the squared distance of each row, (N)."""
        student, teacher = rows.student, rows.teacher
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        return (student - teacher).masked_fill(teacher == -math.inf, 0.0).square().sum(1)
