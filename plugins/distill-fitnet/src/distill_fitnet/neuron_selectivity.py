"""Neuron selectivity transfer, Huang and Wang 2017: channels that attend to the same places."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_fitnet.feature_pairs import Features, feature_pairs
from distill_fitnet.feature_shapes import check_maps
from distill_fitnet.map_sizes import pool_to_smaller
from distill_fitnet.parameters import check, check_choice

Kernel = Literal["polynomial", "linear", "gaussian"]

SMALLEST_NORM = 1e-12
"""A channel whose norm is not larger is dead: it counts as the vector 0, without a gradient."""


class NSTLoss(nn.Module):
    r"""Squared maximum mean discrepancy of the channels, as sets of normalised maps.

    .. math::
        L = \sum_l mean_b \left[ \frac{1}{C_t^2} \sum_{i,j} k(t_i, t_j)
            + \frac{1}{C_s^2} \sum_{i,j} k(s_i, s_j)
            - \frac{2}{C_t C_s} \sum_{i,j} k(t_i, s_j) \right]

    Each :math:`s_i, t_j` is one channel of one sample, flattened over its positions and divided by
    its L2 norm. Student and teacher may have different numbers of channels; the larger map is
    average-pooled to the smaller one first.

    Args:
        kernel: k(x, y). ``"polynomial"`` is :math:`(x \cdot y + c)^d`, ``"linear"`` is
            :math:`x \cdot y`, ``"gaussian"`` is :math:`\exp(-|x - y|^2 / 2 \sigma^2)` with
            :math:`\sigma^2` the mean squared distance of the pairs, taken here over all pairs of
            one sample's channels, of student and teacher together, and without a gradient.
        degree: d >= 1 of the polynomial, 2 in the paper.
        offset: c >= 0 of the polynomial, 0 in the paper.

    Shape:
        - student_features: (B, C_s, H, W), or a list of such, one for each layer.
        - teacher_features: (B, C_t, H', W'), likewise.
        - returns: scalar, summed over layers, computed in float32, or in float64 if one of the
          features is. At least 0, apart from rounding.

    A channel that is 0 everywhere, as ReLUs give them, counts as the vector 0 and gets no
    gradient.

    Raises:
        ValueError: a parameter out of range; features that are no maps or of different number.

    Equals, with these parameters:
        - RepDistiller, mdistiller: the defaults. They weigh it by 50 on CIFAR-100. Their gradient
          leaves out the teacher's own term, which has none anyway.
        - the paper, which has half of a weight lambda in front: a weight of ``lambda / 2``.

    Source: Huang, Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*,
    2017, https://arxiv.org/abs/1707.01219. CIFAR-100, tabulated by the CRD paper: 69.60 (resnet56
    -> resnet20), 73.30 (resnet32x4 -> resnet8x4), 73.68 (WRN-40-2 -> WRN-16-2), 71.53 (vgg13 ->
    vgg8).
    """

    def __init__(self, kernel: Kernel = "polynomial", degree: int = 2, offset: float = 0.0) -> None:
        super().__init__()
        check_choice(self, "kernel", kernel, get_args(Kernel))
        check(self, "degree", degree, degree >= 1, "a whole number >= 1")
        check(self, "offset", offset, 0 <= offset < math.inf, "a finite number >= 0")
        self.kernel = kernel
        self.degree = degree
        self.offset = offset

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        return torch.stack([self._layer_loss(*pair) for pair in pairs]).sum()

    def _layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        student, teacher = pool_to_smaller(student, teacher)
        students, teachers = _unit_channels(student), _unit_channels(teacher)
        channels = torch.cat([students, teachers], dim=1)
        # Autocast would multiply in half precision.
        with torch.autocast(channels.device.type, enabled=False):
            products = channels @ channels.mT
        kernel = self._kernel(products)
        # With weight 1/C_s for a channel of the student and -1/C_t for one of the teacher, the
        # three sums are one quadratic form.
        weights = torch.cat(
            [
                products.new_full((students.shape[1],), 1 / students.shape[1]),
                products.new_full((teachers.shape[1],), -1 / teachers.shape[1]),
            ]
        )
        return (kernel * torch.outer(weights, weights)).sum((1, 2)).mean()

    def _kernel(self, products: Tensor) -> Tensor:
        """Return k(x, y) for all pairs of channels, from their products (B, C, C)."""
        if self.kernel == "linear":
            return products
        if self.kernel == "polynomial":
            return (products + self.offset).pow(self.degree)
        norms = products.diagonal(dim1=1, dim2=2)
        distances = (norms.unsqueeze(1) + norms.unsqueeze(2) - 2 * products).clamp(min=0)
        # 0 where all channels are the same.
        spread = distances.detach().mean((1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
        return torch.exp(-distances / (2 * spread))

    def extra_repr(self) -> str:
        """Return the parameters as ``print(loss)`` shows them."""
        return f"kernel={self.kernel!r}, degree={self.degree}, offset={self.offset}"


def _unit_channels(features: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as unit vectors (B, C, H * W)."""
    flat = features.flatten(2)
    alive = flat.detach().norm(dim=2, keepdim=True) > SMALLEST_NORM
    # Where a channel is dead the slope of the normalisation is 1 / SMALLEST_NORM.
    return torch.where(alive, F.normalize(flat, dim=2, eps=SMALLEST_NORM), 0.0)
