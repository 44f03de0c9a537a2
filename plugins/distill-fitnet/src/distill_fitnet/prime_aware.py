"""Prime-aware adaptive distillation, Zhang et al. 2020: unsure dimensions count less."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.parameters import Parametrized, check, check_choice
from distill_fitnet.feature_pairs import Features, as_list, feature_pairs, sum_over_layers
from distill_fitnet.feature_shapes import check_same
from distill_fitnet.fitted_layers import FittedLayers

Reduction = Literal["mean", "sum"]


class PADVariance(FittedLayers):
    """Log variance of each dimension of the student's embedding: linear layer, batch norm.

    It is trained with the student, in train mode, by ``PADLoss``, whose gradient also flows
    through it to the student.

    Args:
        in_channels: length of the flattened embedding; ``None`` finds it in ``setup``. A list has
            one number for each layer.
        out_channels: dimensions to give a variance to, likewise; ``None`` means those of ``like``,
            or without it those of the embedding itself, as in the paper.

    Shape:
        - features: the student's embedding (B, D) or (B, C, H, W), which is flattened; or a list
          of such. B > 1 in train mode.
        - like: the features to be compared with the teacher's, if of another length; likewise.
          Only its shape is used.
        - returns: (B, D), or a list of such.

    Raises:
        ValueError: lengths below 1, lists of different length, or shapes that do not fit.
        RuntimeError: ``forward`` before the lengths are known.

    Source: Zhang et al., *Prime-Aware Adaptive Distillation*, ECCV 2020,
    https://arxiv.org/abs/2008.01458.
    """

    def __init__(
        self,
        in_channels: list[int] | int | None = None,
        out_channels: list[int] | int | None = None,
    ) -> None:
        super().__init__(in_channels, in_channels if out_channels is None else out_channels)
        self.build_if_known()

    def setup(self, features: Features, like: Features | None = None) -> None:
        """Build the layers for these features, or check that those already built fit them."""
        super().setup(features, features if like is None and self.out_channels is None else like)

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the estimator of one layer."""
        return nn.Sequential(nn.Linear(in_channels, out_channels), nn.BatchNorm1d(out_channels))

    def prepare(self, features: Tensor) -> Tensor:
        """Flatten an embedding."""
        return features.flatten(1)


class PADLoss(Parametrized):
    r"""Squared distance of the embeddings, each dimension divided by a variance of its own.

    .. math::
        L = mean_{b,d} \left[ \frac{(t - s)^2}{\epsilon + e^v} + v \right]

    Args:
        eps: :math:`\epsilon` >= 0, what is added to the variance.
        reduction: over samples; dimensions are always averaged. ``"mean"`` in the paper, or
            ``"sum"``.

    Shape:
        - student_features, teacher_features: embeddings (B, D) or (B, C, H, W) of the same shape,
          which are flattened; or lists of such, one for each layer.
        - log_variance: v, (B, D), or a list of such, as ``PADVariance`` gives it.
        - returns: scalar, summed over layers, computed in float32, or in float64 if one of the
          features is. It can be negative.

    Raises:
        ValueError: a parameter out of range; features and log variances that differ in shape or
            number.

    The published run starts from a student that was trained with cross entropy plus 15 times the
    mean squared error of the same embeddings (``MSELoss``), and trains it on for 30 epochs with
    cross entropy plus this loss, at learning rate 0.002. The paper does not tell this schedule;
    torchdistill has it from the authors.

    Source: Zhang et al., *Prime-Aware Adaptive Distillation*, ECCV 2020,
    https://arxiv.org/abs/2008.01458. ImageNet, ResNet-34 -> ResNet-18: 71.71 (paper and
    torchdistill); mean squared error alone 70.90 (paper), 71.08 (torchdistill).
    """

    def __init__(self, eps: float = 1e-6, reduction: Reduction = "mean") -> None:
        super().__init__()
        check(self, "eps", eps, 0 <= eps < math.inf, "a finite number >= 0")
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.eps = eps
        self.reduction = reduction

    def forward(
        self, student_features: Features, teacher_features: Features, log_variance: Features
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        variances = as_list(log_variance)
        if len(variances) != len(pairs):
            raise ValueError(f"PADLoss: {len(variances)} log variances for {len(pairs)} layers")
        both = zip(pairs, variances, strict=True)
        return sum_over_layers(self, [self._layer_loss(*pair, variance) for pair, variance in both])

    def _layer_loss(self, student: Tensor, teacher: Tensor, log_variance: Tensor) -> Tensor:
        check_same(self, student, teacher, "add an auxiliary module that projects the student's")
        student, teacher = student.flatten(1), teacher.flatten(1)
        log_variance = log_variance.flatten(1).to(student.dtype)
        if log_variance.shape != student.shape:
            raise ValueError(
                f"PADLoss: log_variance {tuple(log_variance.shape)} must have the shape of the "
                f"flattened features {tuple(student.shape)}"
            )
        # 1 / (eps + exp(v)), where exp(v) alone would overflow and its gradient be NaN.
        floor = math.log(self.eps) if self.eps else -math.inf
        precision = torch.exp(-torch.logaddexp(log_variance, torch.full_like(log_variance, floor)))
        per_sample = ((student - teacher).square() * precision + log_variance).mean(dim=1)
        return per_sample.mean() if self.reduction == "mean" else per_sample.sum()
