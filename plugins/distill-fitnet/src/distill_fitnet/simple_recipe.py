"""The simple recipe of Miles and Mikolajczyk 2024: projector, batch norm, log of a power sum."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import Parametrized, check, check_choice
from distill_fitnet.feature_pairs import Features, feature_pairs, sum_over_layers
from distill_fitnet.feature_shapes import check_same
from distill_fitnet.fitted_layers import FittedLayers
from distill_fitnet.vectors import as_vectors

Reduction = Literal["batchmean", "mean", "sum"]

SMALLEST_SUM = 1e-12
"""Added to the sum whose logarithm is taken, since identical features would give log 0."""


class SRDProjector(FittedLayers):
    """Project the student's features to the teacher's width by a linear layer with a bias.

    Args:
        in_channels: channels of the student's features; ``None`` finds them in ``setup``. A list
            has one number for each layer.
        out_channels: channels of the teacher's features, likewise; ``None`` takes those of
            ``like``.

    Shape:
        - features: maps (B, C_s, H, W), which are averaged over their positions, or vectors
          (B, C_s); or a list of such, one for each layer.
        - like: the teacher's, (B, C_t, H', W') or (B, C_t), likewise; only its shape is used.
        - returns: (B, C_t), or a list of such.

    Raises:
        ValueError: channels below 1, lists of different length, features of another form, or
            shapes that do not fit the channels.
        RuntimeError: ``forward`` before the channels are known.

    Source: Miles, Mikolajczyk, *Understanding the Role of the Projector in Knowledge
    Distillation*, AAAI 2024, https://arxiv.org/abs/2303.11098.
    """

    def __init__(
        self,
        in_channels: list[int] | int | None = None,
        out_channels: list[int] | int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the projector of one layer."""
        return nn.Linear(in_channels, out_channels)

    def prepare(self, features: Tensor) -> Tensor:
        """Average maps over their positions."""
        return as_vectors(self, features)


class SRDLoss(Parametrized):
    r"""Logarithm of the summed, high-powered distances of batch-normalised features, plus KL.

    .. math::
        L = w_f \sum_l \log \left( \sum_{b,d} |\hat s_{bd} - \hat t_{bd}|^p + 10^{-12} \right)
            + w_k \, KL(p_t^T \| p_s^T), \qquad
        \hat f = \frac{f - mean_b f}{\sqrt{var_b f + \epsilon}}, \quad p^T = softmax(logits / T)

    Features are normalised without learned scale and shift and with the statistics of the batch,
    on both sides and also where the model is in eval mode; so the loss depends on the batch that
    one process sees, and a single sample gives no gradient. The sum is over all elements: taking a
    mean instead would shift the loss by a constant.

    ``T^2`` does **not** multiply the KL term here, as published; with the published T = 1 there is
    no difference. The cross entropy with the labels is no part of this loss: add it with weight 1.

    Args:
        exponent: p >= 1. The published code has 4.
        feature_weight: w_f >= 0, 2 as published.
        kl_weight: w_k >= 0, 1 as published; with 0 the logits are not looked at.
        temperature: T > 0.
        normalize: whether to normalise the features; ``False`` takes them as they are, for
            torchdistill, where both sides are normalised by modules of their own.
        norm_eps: :math:`\epsilon` > 0 of the normalisation.
        reduction: of the KL term: ``"batchmean"`` divides the sum by B, ``"mean"`` by the number
            of logits, ``"sum"`` by nothing.

    Shape:
        - student_features: what ``SRDProjector`` gives, (B, D); maps (B, D, H, W) are averaged
          over their positions; or a list of such, one for each layer.
        - teacher_features: (B, D) or (B, D, H, W), likewise.
        - student, teacher: logits (B, K), needed unless ``kl_weight`` is 0.
        - returns: scalar, computed in float32, or in float64 if one of the features is. It can be
          negative: identical features give ``w_f * log(1e-12)``, without a gradient.

    Raises:
        ValueError: a parameter out of range; features or logits that differ in shape or number;
            logits missing.

    Source: Miles, Mikolajczyk, *Understanding the Role of the Projector in Knowledge
    Distillation*, AAAI 2024, https://arxiv.org/abs/2303.11098. ImageNet, ResNet-34 -> ResNet-18:
    71.63 (paper), 71.87 (authors' repository), 71.92 (torchdistill, with the whole teacher in
    train mode).
    """

    def __init__(
        self,
        exponent: float = 4.0,
        feature_weight: float = 2.0,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        normalize: bool = True,
        norm_eps: float = 1e-4,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__()
        # Below 1 the slope is infinite where student and teacher agree.
        check(self, "exponent", exponent, 1 <= exponent < math.inf, "a finite number >= 1")
        for name, weight in (("feature_weight", feature_weight), ("kl_weight", kl_weight)):
            check(self, name, weight, 0 <= weight < math.inf, "a finite number >= 0")
        check(self, "temperature", temperature, 0 < temperature < math.inf, "a finite number > 0")
        check(self, "norm_eps", norm_eps, 0 < norm_eps < math.inf, "a finite number > 0")
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.exponent = exponent
        self.feature_weight = feature_weight
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.normalize = normalize
        self.norm_eps = norm_eps
        self.reduction = reduction

    def forward(
        self,
        student_features: Features,
        teacher_features: Features,
        student: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        distances = sum_over_layers(self, [self._log_distance(*pair) for pair in pairs])
        loss = self.feature_weight * distances
        if self.kl_weight == 0:
            return loss
        if student is None or teacher is None:
            raise ValueError(
                "SRDLoss: logits of student and teacher are needed unless kl_weight is 0"
            )
        return loss + self.kl_weight * self._divergence(student, teacher)

    def _log_distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = as_vectors(self, student), as_vectors(self, teacher)
        check_same(self, student, teacher, "project the student's with SRDProjector")
        if self.normalize:
            student, teacher = self._normalized(student), self._normalized(teacher)
        powers = (student - teacher).abs().pow(self.exponent)
        return torch.log(powers.sum() + SMALLEST_SUM)

    def _normalized(self, features: Tensor) -> Tensor:
        # Not F.batch_norm, which refuses a batch of one sample.
        variance, mean = torch.var_mean(features, dim=0, correction=0)
        return (features - mean) * torch.rsqrt(variance + self.norm_eps)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        ((student, teacher),) = feature_pairs(student, teacher)
        check_same(self, student, teacher, "both must have the same classes")
        log_student = F.log_softmax(student / self.temperature, dim=1)
        teacher_classes = F.softmax(teacher / self.temperature, dim=1)
        total = F.kl_div(log_student, teacher_classes, reduction="sum")
        counts = {"batchmean": len(student), "mean": student.numel(), "sum": 1}
        return total / counts[self.reduction]
