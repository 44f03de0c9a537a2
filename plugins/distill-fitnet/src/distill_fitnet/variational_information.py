"""Variational information distillation, Ahn et al. 2019: predict the teacher's maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import Parametrized, check
from distill_fitnet.feature_pairs import Features, as_list, feature_pairs, sum_over_layers
from distill_fitnet.feature_shapes import channel_list, check_same
from distill_fitnet.fitted_layers import FittedLayers, check_built, settled
from distill_fitnet.map_sizes import pool_to_smaller


class VIDRegressor(FittedLayers):
    """Predict the teacher's maps from the student's: three 1x1 convolutions, ReLU between them.

    The convolutions have no bias. A student's map that is larger than ``like`` is average-pooled
    to its size first, as RepDistiller and mdistiller do; so wire ``like`` wherever the sizes may
    differ. Without it the prediction keeps the student's size and ``VIDLoss`` pools it
    afterwards, which costs more and, because of the ReLUs, is not the same.

    Args:
        in_channels: channels of the student's maps; ``None`` finds them in ``setup``. A list has
            one number for each layer.
        out_channels: channels of the teacher's maps, likewise; ``None`` takes those of ``like``.
        mid_channels: channels between the convolutions, the same for all layers; ``None`` means
            those of the layer's teacher, as RepDistiller has it.

    Shape:
        - features: (B, C_s, H, W), or a list of such, one for each layer.
        - like: the teacher's maps (B, C_t, H', W'), likewise; only its shape is used.
        - returns: (B, C_t, min(H, H'), min(W, W')), or a list of such.

    Raises:
        ValueError: channels below 1, lists of different length, features that are no maps, or
            shapes that do not fit the channels.
        RuntimeError: ``forward`` before the channels are known.

    Source: Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    https://arxiv.org/abs/1904.05835.
    """

    def __init__(
        self,
        in_channels: list[int] | int | None = None,
        out_channels: list[int] | int | None = None,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels)
        fits = mid_channels is None or mid_channels >= 1
        check(self, "mid_channels", mid_channels, fits, "a whole number >= 1, or None")
        self.mid_channels = mid_channels
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the regressor of one layer."""
        middle = self.mid_channels or out_channels
        return nn.Sequential(
            nn.Conv2d(in_channels, middle, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(middle, middle, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(middle, out_channels, kernel_size=1, bias=False),
        )

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Pool the student's map if it is the larger one, and predict the teacher's."""
        if like is not None:
            features, _ = pool_to_smaller(self.prepare(features), self.prepare(like))
        return super().apply_layer(layer, features, like)


class VIDLoss(Parametrized):
    r"""Negative log-likelihood of the teacher's features, with a learned variance per channel.

    .. math::
        L = \sum_l mean \; \tfrac{1}{2} \left[ \frac{(\mu - t)^2}{\sigma_c^2} + \log \sigma_c^2
            \right], \qquad \sigma_c^2 = softplus(a_c) + \epsilon

    :math:`\mu` is what ``VIDRegressor`` predicts, the mean is taken over all elements of a layer,
    and the constant :math:`\log(2 \pi) / 2` is left out, so the loss can be negative. The larger
    of two maps is average-pooled to the smaller one first.

    The :math:`a_c` are parameters of this loss, ``raw_variances.<layer>``: they must be in the
    optimizer. (mdistiller keeps its own out of it by mistake, so they stay at their start.)

    Args:
        channels: channels of the features, a number or a list with one for each layer; ``None``
            finds them in ``setup``.
        initial_variance: where every :math:`\sigma_c^2` starts, > ``eps``. 5 in RepDistiller.
        eps: what is added to the softplus, >= 0. 1e-5 in RepDistiller.

    Shape:
        - student_features: predictions (B, C, H, W), or a list of such, one for each layer.
        - teacher_features: (B, C, H', W'), likewise.
        - returns: scalar, computed in float32, or in float64 if one of the features is.

    Raises:
        ValueError: a parameter out of range; features that are not of the same channels, or of
            other channels than the loss was built for.
        RuntimeError: ``forward`` before the channels are known.

    Source: Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    https://arxiv.org/abs/1904.05835. CIFAR-100, as RepDistiller has it, with weight 1: 70.38
    (resnet56 -> resnet20), 73.09 (resnet32x4 -> resnet8x4), 74.11 (WRN-40-2 -> WRN-16-2), 71.23
    (vgg13 -> vgg8).
    """

    def __init__(
        self,
        channels: list[int] | int | None = None,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check(self, "eps", eps, 0 <= eps < math.inf, "a finite number >= 0")
        fits = eps < initial_variance < math.inf
        check(self, "initial_variance", initial_variance, fits, f"a finite number > eps, {eps}")
        self.channels = channel_list(self, "channels", channels)
        self.initial_variance = initial_variance
        self.eps = eps
        self.raw_variances = nn.ParameterList()
        self._build(self.channels or [])

    def setup(self, student_features: Features, teacher_features: Features) -> None:
        """Make a variance for each of the features' channels, or check those that there are.

        Raises:
            ValueError: if the features cannot be compared, or have other channels.
        """
        pairs = feature_pairs(student_features, teacher_features)
        found = [self._comparable(*pair)[0].shape[1] for pair in pairs]
        self.channels = settled(self, "channels", self.channels, found, as_list(student_features))
        if not self.raw_variances:
            self._build(found)
        for level, (student, _) in enumerate(pairs):
            raw = self.raw_variances[level].detach()
            self.raw_variances[level] = nn.Parameter(raw.to(student))

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        check_built(self, self.raw_variances, len(pairs), "variances")
        both = zip(self.raw_variances, pairs, strict=True)
        return sum_over_layers(self, [self._layer_loss(raw, *pair) for raw, pair in both])

    def _build(self, channels: list[int]) -> None:
        start = self.initial_variance - self.eps
        # The inverse of softplus, log(exp(x) - 1), in the form that stands large x.
        raw = start + math.log(-math.expm1(-start))
        self.raw_variances.extend(nn.Parameter(torch.full((n,), raw)) for n in channels)

    def _comparable(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.ndim == teacher.ndim == 4:
            student, teacher = pool_to_smaller(student, teacher)
        check_same(self, student, teacher, "predict the teacher's with VIDRegressor")
        return student, teacher

    def _layer_loss(self, raw: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = self._comparable(student, teacher)
        if student.shape[1] != len(raw):
            raise ValueError(f"VIDLoss: built for {len(raw)} channels, got {tuple(student.shape)}")
        variance = F.softplus(raw) + self.eps
        shape = [-1] + [1] * (student.ndim - 2)
        gap = (student - teacher).square() / variance.view(shape)
        # Every channel has as many elements, so their mean is that of the log variances.
        return 0.5 * (gap.mean() + variance.log().mean())
