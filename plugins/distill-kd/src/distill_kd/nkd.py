"""NKD, Yang et al. 2023: the teacher's sureness of the label, and its classes without the label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import check_factor
from distill_kd.logits import (
    LabelledLoss,
    Rows,
    SoftTargets,
    check_temperature,
    standardized,
)
from distill_kd.target_and_rest import check_has_rest, margin, rest_log_probabilities


class NKDLoss(LabelledLoss):
    r"""Cross entropy with the teacher's probability of the label, and with its other classes.

    .. math::
        L = -\frac{1}{B} \sum_b \left[ p_t(y) \log p_s(y)
            + \gamma T^2 \sum_{k \ne y} q_t(k) \log q_s(k) \right], \qquad p = softmax(logits)

    ``q`` is the softmax of logits / T over all classes but the label y, so that it sums to 1 on
    both sides, which the parts that the cross entropy of plain KD falls into do not.

    Both parts are cross entropies: equal logits give the teacher's entropy rather than 0, and a
    gradient in the first part. The cross entropy with the labels is a term of its own, of weight 1.

    Args:
        temperature: T > 0, dividing the logits of the other classes; the label's probability is
            that at temperature 1.
        gamma: weight of the other classes, >= 0. The authors': 1.5 on ImageNet (1.0 for vision
            transformers), 3.5 with T = 3 on CIFAR-100.
        soft_targets: what to do with class probabilities (MixUp, CutMix, smoothed labels):
            ``"argmax"`` takes the likeliest class for the label, as the authors do; ``"error"``
            refuses them.
        ignore_index: the label of positions that do not count.
        standardize: for the other classes, take logits less their mean, in units of their standard
            deviation, both over all classes. Logits must be finite.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K), K > 1. The teacher may exclude a class by ``-inf``, the
          student by a low number such as ``-1e4``. Of dense logits (B, K, H, W) and of texts
          (B, T, V) each position is a sample.
        - targets: class indices of any integer type, (B), (B, H, W) or (B, T); or class
          probabilities of the logits' shape, see ``soft_targets``.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, the mean over positions that count, computed in float32, or in float64 if
          one of the logits is. Only the student gets a gradient.

    A teacher that excludes every class but the label tells nothing of the others: that part of the
    sample is 0.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; one class;
            targets that do not fit, or class probabilities with ``soft_targets="error"``.

    Equals the authors' ``NKDLoss`` in cls_KD.

    Source: Yang, Zeng, Li, Zhang, Yuan, Li, *From Knowledge Distillation to Self-Knowledge
    Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels*, ICCV 2023,
    https://arxiv.org/abs/2303.13005; code https://github.com/yzd-v/cls_KD.

    Example:
        >>> import torch
        >>> from distill_kd.nkd import NKDLoss
        >>> loss = NKDLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.9142
    """

    def __init__(
        self,
        temperature: float = 1.0,
        gamma: float = 1.5,
        soft_targets: SoftTargets = "argmax",
        ignore_index: int = -100,
        standardize: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(soft_targets, ignore_index, class_dim)
        check_temperature(self, temperature)
        check_factor(self, "gamma", gamma)
        self.temperature = temperature
        self.gamma = gamma
        self.standardize = standardize

    def row_losses(self, rows: Rows) -> Tensor:
        """Return both cross entropies of each row, weighted, (N)."""
        check_has_rest(self, rows.student)
        label = rows.classes()[:, None]
        sure = margin(rows.teacher, label).sigmoid()
        target = -sure * F.logsigmoid(margin(rows.student, label))
        student, teacher = (
            rest_log_probabilities(logits, label, self.temperature)
            for logits in self._matched(rows)
        )
        rest = -(teacher.exp() * student).sum(1)
        return torch.add(target, rest, alpha=self.gamma * self.temperature**2)

    def _matched(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.standardize:
            return standardized(rows.student), standardized(rows.teacher)
        return rows.student, rows.teacher
