"""DKD, Zhao et al. 2022: label against rest, and the rest among themselves, weighed apart."""

from __future__ import annotations

from torch import Tensor

from distill.parameters import check_factor
from distill_kd.logits import (
    LabelledLoss,
    Rows,
    SoftTargets,
    check_temperature,
    divergence,
    standardized,
)
from distill_kd.target_and_rest import (
    check_has_rest,
    margin,
    margin_divergence,
    rest_log_probabilities,
)


class DKDLoss(LabelledLoss):
    r"""The divergence of knowledge distillation in two parts, each with a weight of its own.

    .. math::
        L = T^2 \left[ \alpha \, KL(b_t \| b_s) + \beta \, KL(q_t \| q_s) \right], \qquad
        b = [p_y, 1 - p_y], \quad p = softmax(logits / T)

    ``q`` is the softmax over all classes but the label y, of logits / T. The first part (TCKD)
    tells how hard a sample is; the second (NCKD) how the wrong classes compare, which plain KD
    multiplies by the teacher's doubt ``1 - p_y``.

    The cross entropy is a term of its own, of weight 1. The authors raise the weight of this one
    from epoch to epoch: ``weight: {over: 20}`` is their min(epoch / 20, 1) on CIFAR-100.

    Args:
        temperature: T > 0, dividing both sides' logits.
        alpha: weight of the label against the rest, >= 0.
        beta: weight of the rest among themselves, >= 0. The authors' on CIFAR-100 is 8, 6 for wide
            ResNets and VGG, and 2 for resnet56 -> 20 and 110 -> 32; 0.5 on ImageNet.
        soft_targets: what to do with class probabilities (MixUp, CutMix, smoothed labels):
            ``"argmax"`` takes the likeliest class for the label, ``"error"`` refuses them.
        ignore_index: the label of positions that do not count.
        standardize: match logits less their mean, in units of their standard deviation, which must
            be finite.
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

    A teacher that excludes every class but the label tells nothing of the rest: the second part of
    that sample is 0.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; one class;
            targets that do not fit, or class probabilities with ``soft_targets="error"``.

    Equals mdistiller's ``DKD`` and cls_KD's ``DKDLoss``. mmrazor's divides neither part by B in its
    shipped settings, though they say ``mean``.

    Source: Zhao, Cui, Song, Qiu, Liang, *Decoupled Knowledge Distillation*, CVPR 2022,
    https://arxiv.org/abs/2203.08679; code https://github.com/megvii-research/mdistiller.

    Example:
        >>> import torch
        >>> from distill_kd.dkd import DKDLoss
        >>> loss = DKDLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.626
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        soft_targets: SoftTargets = "argmax",
        ignore_index: int = -100,
        standardize: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(soft_targets, ignore_index, class_dim)
        check_temperature(self, temperature)
        check_factor(self, "alpha", alpha)
        check_factor(self, "beta", beta)
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.standardize = standardize

    def row_losses(self, rows: Rows) -> Tensor:
        """Return both parts of each row, weighted, (N)."""
        check_has_rest(self, rows.student)
        label = rows.classes()[:, None]
        student, teacher = (self._scaled(logits) for logits in (rows.student, rows.teacher))
        target = margin_divergence(margin(student, label), margin(teacher, label))
        rest = divergence(
            rest_log_probabilities(student, label), rest_log_probabilities(teacher, label)
        )
        return (self.alpha * target + self.beta * rest) * self.temperature**2

    def _scaled(self, logits: Tensor) -> Tensor:
        return (standardized(logits) if self.standardize else logits) / self.temperature
