"""Neuron selectivity transfer, Huang and Wang 2017: channels that attend to the same places."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import check, check_choice
from distill_fitnet.feature_pairs import PairwiseLoss
from distill_fitnet.feature_shapes import check_maps
from distill_fitnet.map_sizes import pool_to_smaller
from distill_fitnet.vectors import unit_vectors

Kernel = Literal["polynomial", "linear", "gaussian"]

SMALLEST_NORM = 1e-12
"""A channel whose norm is not larger is dead: it counts as the vector 0, without a gradient."""


class NSTLoss(PairwiseLoss):
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

    Second derivatives are not meant to be taken.

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

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the discrepancy of one layer's channels."""
        check_maps(self, student, teacher)
        students, teachers = (each.flatten(2) for each in pool_to_smaller(student, teacher))
        quadratic = self.kernel == "polynomial" and self.degree == 2
        # Autocast would multiply in half precision.
        with torch.autocast(students.device.type, enabled=False):
            if self.kernel == "linear":
                return _squared_distance(*(_units(side).mean(1) for side in (students, teachers)))
            if quadratic and _fewer_products_over_positions(students, teachers):
                return self._over_positions(_units(students), _units(teachers))
            return self._over_channels(students, teachers)

    def _over_positions(self, students: Tensor, teachers: Tensor) -> Tensor:
        """Return the discrepancy with (x . y + c)^2 by matrices of positions, not of channels.

        The sum over all pairs of (x_i . x_j)^2, times their weights, is the squared norm of the sum
        over all i of x_i x_i^T, times its weight; weights add up to 0, so that c^2 cancels.
        """
        ours, theirs = (_own_products(side.mT) / side.shape[1] for side in (students, teachers))
        discrepancy = _squared_distance(ours, theirs)
        if self.offset:
            means = _squared_distance(students.mean(1), teachers.mean(1))
            discrepancy = discrepancy + 2 * self.offset * means
        return discrepancy

    def _over_channels(self, students: Tensor, teachers: Tensor) -> Tensor:
        """Return the discrepancy by the kernel of all pairs of channels, not yet normalised."""
        own, others = _own_products(students), _own_products(teachers)
        mixed = students @ teachers.mT
        # Products are divided by norms rather than channels, which are more numbers.
        ours, theirs = _reciprocal_norms(own), _reciprocal_norms(others)
        normalised = (
            own * (ours.mT * ours),
            others * (theirs.mT * theirs),
            mixed * (ours.mT * theirs),
        )
        own, others, mixed = self._kernels(*normalised)
        return own.mean() + others.mean() - 2 * mixed.mean()

    def _kernels(self, own: Tensor, others: Tensor, mixed: Tensor) -> list[Tensor]:
        """Return k(x, y) from products, of channels of the student, of the teacher, of both."""
        if self.kernel == "polynomial":
            return [(products + self.offset).pow(self.degree) for products in (own, others, mixed)]
        ours, theirs = (products.diagonal(dim1=1, dim2=2) for products in (own, others))
        distances = [
            (first.unsqueeze(2) + second.unsqueeze(1) - 2 * products).clamp(min=0)
            for first, second, products in (
                (ours, ours, own),
                (theirs, theirs, others),
                (ours, theirs, mixed),
            )
        ]
        same, same_others, between = (each.detach().sum((1, 2)) for each in distances)
        pairs = (ours.shape[1] + theirs.shape[1]) ** 2
        # 0 where all channels are the same.
        spread = ((same + same_others + 2 * between) / pairs).clamp(min=SMALLEST_NORM)
        return [torch.exp(-each / (2 * spread.view(-1, 1, 1))) for each in distances]


def _squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the squared distance of one sample's matrices, averaged over the samples."""
    return F.mse_loss(first, second, reduction="sum") / len(first)


def _fewer_products_over_positions(students: Tensor, teachers: Tensor) -> bool:
    """Say which way multiplies less, there and back; the teacher has no way back."""
    ours, theirs, positions = students.shape[1], teachers.shape[1], students.shape[2]
    over_channels = 2 * ours**2 + theirs**2 + 2 * ours * theirs
    # The channels' matrices are normalised, and so are the channels themselves for the positions':
    # that weighs as much as a tenth of the products.
    return 1.1 * positions * (2 * ours + theirs) < over_channels


def _units(features: Tensor) -> Tensor:
    """Return channels (B, C, positions) divided by their norms."""
    return unit_vectors(features, dim=2, smallest=SMALLEST_NORM)


def _own_products(rows: Tensor) -> Tensor:
    """Return x_i . x_j for all pairs of rows (B, N, M), for a loss that is symmetric in i and j.

    Then half of the gradient is that of the first factor, and the other half the same.
    """
    products = rows @ rows.detach().mT
    return torch.lerp(products.detach(), products, 2.0) if rows.requires_grad else products


def _reciprocal_norms(products: Tensor) -> Tensor:
    """Return 1 / |x_i|, (B, 1, C), from x_i . x_j; 0, without a gradient, for a dead channel."""
    squares = products.diagonal(dim1=1, dim2=2).unsqueeze(1)
    return squares.masked_fill(squares <= SMALLEST_NORM**2, math.inf).rsqrt()
