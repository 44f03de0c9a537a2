"""Channel-wise distillation, Shu et al. 2021: each channel as a distribution over positions."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from distill.parameters import check
from distill_fitnet.feature_pairs import PairwiseLoss
from distill_fitnet.feature_shapes import check_maps


class CWDLoss(PairwiseLoss):
    r"""Divergence of where each channel looks, from where the teacher's looks.

    .. math::
        L = \sum_l \frac{T^2}{B \, C} \sum_{b,c} KL(p^t_{bc} \| p^s_{bc}),
        \qquad p_{bc} = softmax_{positions}(f_{bc} / T)

    For dense prediction: logits before they are scaled up, or maps of the backbone. A student's
    map of another height or width is interpolated bilinearly (corners not aligned) to the
    teacher's.

    Args:
        temperature: T > 0. 4 in the paper, 1 in mmrazor's configurations.

    Shape:
        - student_features: (B, C, H, W), or a list of such, one for each layer.
        - teacher_features: (B, C, H', W'), likewise.
        - returns: scalar, computed in float32, or in float64 if one of the features is.

    Raises:
        ValueError: a parameter out of range; features that are no maps, of different channels or
            of different number.

    Equals mmrazor's ``ChannelWiseDivergence(tau=temperature)`` and, in the authors' code,
    ``CriterionCWD("channel", "kl", temperature)``: both divide the sum by B * C and multiply it by
    T^2. mmrazor weighs it by 5, with logits and T = 1; the paper by 3 for logits and by 50 for
    maps, with T = 4.

    Source: Shu, Liu, Gao, Yan, Shen, *Channel-wise Knowledge Distillation for Dense Prediction*,
    ICCV 2021, https://arxiv.org/abs/2011.13256.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check(self, "temperature", temperature, 0 < temperature < math.inf, "a finite number > 0")
        self.temperature = temperature

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of one layer's maps."""
        check_maps(
            self,
            student,
            teacher,
            "bring the student's to the teacher's by a 1x1 Conv2d as an auxiliary module, or by "
            "`adapter: auto`",
        )
        if student.shape[-2:] != teacher.shape[-2:]:
            student = F.interpolate(student, teacher.shape[-2:], mode="bilinear")
        log_student = F.log_softmax(student.flatten(2) / self.temperature, dim=2)
        log_teacher = F.log_softmax(teacher.flatten(2) / self.temperature, dim=2)
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        channels = student.shape[0] * student.shape[1]
        return divergence * (self.temperature**2 / channels)
