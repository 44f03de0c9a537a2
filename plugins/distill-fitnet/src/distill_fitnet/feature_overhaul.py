"""The overhaul of feature distillation (OFD): margin ReLU and partial distance before activation.

Features are captured before their activation, on both sides: in torchvision's ResNets what the last
ReLU of a layer takes. The negative responses of a teacher's channel are represented by their mean,
which the batch norm before the activation tells:

.. code-block:: yaml

    auxiliary:
      connector:
        type: OFDConnector
        inputs:
          features: [student.layer3.-1.relu@-1:input, student.layer4.-1.relu@-1:input]
          like: [teacher.layer3.-1.relu@-1:input, teacher.layer4.-1.relu@-1:input]
    criterion:
      ofd:
        type: OFDLoss
        inputs:
          student_features: connector
          teacher_features: [teacher.layer3.-1.relu@-1:input, teacher.layer4.-1.relu@-1:input]
          bn_weight: [teacher.layer3.-1.bn2.weight, teacher.layer4.-1.bn2.weight]
          bn_bias: [teacher.layer3.-1.bn2.bias, teacher.layer4.-1.bn2.bias]
        params: {scale: 1.0e-4}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.parameters import Parametrized, check
from distill_fitnet.activation_boundaries import ABConnector
from distill_fitnet.feature_pairs import (
    Features,
    as_list,
    feature_pairs,
    halving_weights,
    sum_over_layers,
)
from distill_fitnet.feature_shapes import check_same

RARE = 0.001
"""Chance of a negative response at and below which its mean is not computed."""


class OFDConnector(ABConnector):
    """Adapts the student's maps to the teacher's channels: 1x1 convolution and batch norm each.

    The same as ``ABConnector``, an earlier method of the same authors.

    Args:
        in_channels: the student's, a list with one for each layer; ``None`` takes them from
            ``features``.
        out_channels: the teacher's; ``None`` takes them from ``like``.

    Shape:
        - features: a map (B, C_s, H, W) or a list of maps.
        - like: the teacher's maps, of which only the shapes are used.
        - returns: maps (B, C_t, H, W), a list for a list.

    Raises:
        ValueError: if channels do not fit, are not known, or a feature is not a map.
        RuntimeError: if called before its layers are built.

    Source: see ``OFDLoss``.
    """


class OFDLoss(Parametrized):
    r"""Partial squared distance between the student's maps and the teacher's after a margin ReLU.

    .. math::
        L = \frac{scale}{B} \sum_{l=1}^{L} 2^{l-L} \sum_{b,c,i} d(s_{bci}, \max(t_{bci}, m_c)),
        \qquad d(s, t) = 0 \text{ where } s \le t \le 0, \text{ else } (s - t)^2

    The margin ``m_c`` is the mean negative response of channel ``c``: that of a normal distribution
    with the bias and the absolute weight of the batch norm as mean and standard deviation,

    .. math::
        m = E[x \mid x < 0] = \mu - \sigma \, \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)},

    and ``-3 sigma`` where responses are negative with a probability of at most 0.001, as in the
    authors' code. A layer counts twice as much as the one before it.

    The authors let the teacher's batch norms normalise by the batch (``train`` mode); with a
    teacher in ``eval`` mode, as is usual here, its running statistics are used.

    Args:
        scale: factor of the whole, >= 0. The authors take 1e-3 on CIFAR-100, 1e-4 on ImageNet and
            1e-5 for segmentation (which also weighs its layers differently).

    Shape:
        - student_features: the adapted maps (B, C, ...) of ``OFDConnector``; one, or a list from
          shallow to deep.
        - teacher_features: before activation, of the same shapes.
        - bn_weight, bn_bias: (C) of the batch norm before each activation, a list for lists.
        - returns: scalar, computed in float32 or wider. Only the student gets gradients.

    Raises:
        ValueError: scale out of range; features, weights and biases that do not fit each other.

    Source: Heo, Kim, Yun, Park, Kwak, Choi, *A Comprehensive Overhaul of Feature Distillation*,
    ICCV 2019, https://arxiv.org/abs/1904.01866; code: github.com/clovaai/overhaul-distillation.
    Its segmentation code writes the distance out differently, with the same values.
    """

    def __init__(self, scale: float = 1e-3) -> None:
        super().__init__()
        check(self, "scale", scale, 0 <= scale < math.inf, "a finite number >= 0")
        self.scale = scale

    def forward(
        self,
        student_features: Features,
        teacher_features: Features,
        bn_weight: Features,
        bn_bias: Features,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        weights, biases = as_list(bn_weight), as_list(bn_bias)
        if not len(pairs) == len(weights) == len(biases):
            raise ValueError(
                f"OFDLoss: {len(pairs)} features need as many bn_weight and bn_bias, got "
                f"{len(weights)} and {len(biases)}"
            )
        given = zip(pairs, weights, biases, strict=True)
        distances = [self._distance(*pair, weight, bias) for pair, weight, bias in given]
        return self.scale * sum_over_layers(self, distances, halving_weights(len(pairs)))

    def _distance(self, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the partial squared distance of one layer for each sample."""
        check_same(self, student, teacher, "adapt the student's maps with OFDConnector")
        if not tuple(weight.shape) == tuple(bias.shape) == (teacher.shape[1],):
            raise ValueError(
                f"OFDLoss: teacher's feature {tuple(teacher.shape)} needs bn_weight and bn_bias of "
                f"shape ({teacher.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        margin = negative_mean(weight.to(teacher.dtype), bias.to(teacher.dtype))
        target = teacher.maximum(margin.view(-1, *(1,) * (teacher.ndim - 2)))
        counts = (student > target) | (target > 0)
        return ((student - target) * counts).square().sum() / len(student)


def negative_mean(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the mean negative response of channels behind a batch norm, without a gradient.

    Args:
        weight: (C) of the batch norm; its absolute value is the standard deviation.
        bias: (C), the mean.
    """
    deviation, mean = weight.detach().abs(), bias.detach()
    # Of a weight of 0 this makes inf or NaN, and of those below a negative bias itself, or else 0.
    ratio = mean / deviation
    chance = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(chance > RARE, mean - deviation * density / chance, -3 * deviation)
