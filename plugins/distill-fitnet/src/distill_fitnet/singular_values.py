"""Distillation by singular value decomposition, Lee et al. 2018: how layers' main axes relate."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import Parametrized, check
from distill_fitnet.feature_pairs import Features, Pair, feature_pairs, sum_over_layers
from distill_fitnet.feature_shapes import check_maps
from distill_fitnet.singular_vectors import (
    MainVector,
    by_sample,
    main_vectors,
    of_samples,
    right_singular_vectors,
)

ROOM = 0.01
"""How far above one half a squared cosine must be to be taken for that for certain."""


class KDSVDLoss(Parametrized):
    r"""Squared difference of how the main directions of adjacent layers relate.

    Each sample's map is a matrix, positions x channels, of which the singular vectors on the side
    of the channels are taken:

    1. The teacher's first k vectors :math:`t_j`, and the student's first k + ``spare``. Nothing
       determines a vector's sign, which matters in step 4: the teacher's are turned so that their
       components add up to a positive number.
    2. For each :math:`t_j` the student's vector of largest absolute cosine with it, with the sign
       turned to agree, is :math:`s_j`.
    3. Both are multiplied by the teacher's j-th singular value, where its first k are divided by
       their norm. So with k = 1 they stay unit vectors.
    4. Between a layer l and the one before, for all pairs of channels,
       :math:`r_j(a, b) = \exp(-(v_j^l(a) - v_j^{l-1}(b))^2 / w)`, from the student's vectors and
       from the teacher's.

    .. math::
        L = \frac{1}{B} \sum_{l > 1} \sum_{b,j,a,c} \left( r^s_j(a, c) - r^t_j(a, c) \right)^2

    These are the steps of RepDistiller's code, where signs are those that the decomposition happens
    to give; behind a ReLU and with k = 1 that is the same. The authors' own differs: half of the
    sum over the batch, not divided by B, times the square root of k, and k + 1 candidates.
    mdistiller decomposes another matrix, channels and rows x columns.

    The gradient of singular vectors divides by the gaps between squared singular values. Here a gap
    that is lost in rounding (relative to the larger value, below the square root of the type's
    precision) is damped to 0, so that equal singular values and maps that are 0 give finite
    gradients; elsewhere the gradient is that of ``torch.linalg.svd``. Second derivatives are not
    meant to be taken.

    With k = 1 the first vector of a map is enough where it stands out, as behind a ReLU. It is
    found by multiplying with the matrix, and taken if a bound on its error is within rounding and
    no other of the student's can be closer to the teacher's: squared cosines add up to 1 at most.
    Maps for which that does not hold, and all with k > 1, are decomposed: a matrix of their
    channels or positions, whichever are fewer, which is slow. On a GPU the host waits to know which
    they are, and for each decomposition.

    Args:
        k: singular vectors to compare, >= 1.
        spare: how many more of the student's are candidates, >= 0.
        width: w > 0 of the radial basis function.

    Shape:
        - student_features: a list of at least two maps (B, C_l, H, W), the shallowest first.
        - teacher_features: likewise, of the same channels; heights and widths may differ. Each
          map must have at least k channels and k positions.
        - returns: scalar, computed in float32, or in float64 if one of the features is.

    Raises:
        ValueError: a parameter out of range; fewer than two layers; features that are no maps, of
            different channels, or too small for k vectors.

    Weight 1 in mdistiller.

    Source: Lee, Kim, Song, *Self-supervised Knowledge Distillation Using Singular Value
    Decomposition*, ECCV 2018, https://arxiv.org/abs/1807.06819.
    """

    def __init__(self, k: int = 1, spare: int = 3, width: float = 8.0) -> None:
        super().__init__()
        check(self, "k", k, k >= 1, "a whole number >= 1")
        check(self, "spare", spare, spare >= 0, "a whole number >= 0")
        check(self, "width", width, 0 < width < math.inf, "a finite number > 0")
        self.k = k
        self.spare = spare
        self.width = width

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        if len(pairs) < 2:
            raise ValueError("KDSVDLoss: at least two layers are needed, for it relates layers")
        # Autocast would multiply in half precision.
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            series = [self._sum_and_difference(*self._aligned(*pair)) for pair in pairs]
            losses = [_relation_loss(above, below) for below, above in pairwise(series)]
        return sum_over_layers(self, losses) / len(pairs[0][0])

    def _aligned(self, student: Tensor, teacher: Tensor) -> Pair:
        """Return the vectors (B, C, k) of student and teacher that belong together."""
        check_maps(
            self, student, teacher, "bring the student's to the teacher's by a 1x1 convolution"
        )
        self._check_size(student)
        self._check_size(teacher)
        if self.k > 1:
            target, values = right_singular_vectors(teacher, self.k)
            scale = F.normalize(values, dim=1).unsqueeze(1)
            target = _turned(target)
            return self._matching(student, target) * scale, target * scale
        target = _turned(main_vectors(teacher))
        return self._matching_main(student, target), target

    def _matching(self, student: Tensor, target: Tensor) -> Tensor:
        """Return for each vector of the teacher (B, C, k) the student's closest, turned to it."""
        candidates, _ = right_singular_vectors(student, self.k + self.spare)
        cosines = candidates.detach().mT @ target
        best = cosines.abs().argmax(dim=1, keepdim=True)
        chosen = candidates.gather(2, best.expand(-1, target.shape[1], -1))
        return chosen * cosines.gather(1, best).sign()

    def _matching_main(self, student: Tensor, target: Tensor) -> Tensor:
        """Return the same for one vector, decomposing only maps whose closest is not obvious."""
        main = MainVector.of(student)
        cosines = (main.on_channels() * target).sum(1, keepdim=True)
        # Half of the square, or more, leaves less for any other.
        obvious = main.clear & (cosines.square().flatten() > 0.5 + ROOM)
        signs = cosines.sign()
        return by_sample(
            obvious,
            lambda chosen: main.vectors(chosen) * of_samples(signs, chosen),
            lambda others: self._matching(of_samples(student, others), of_samples(target, others)),
        )

    def _sum_and_difference(self, student: Tensor, teacher: Tensor) -> Pair:
        """Return P + P' and P - P', (B, k, terms, C), of vectors (B, C, k).

        exp(-(a - c)^2 / w) = P(a) . P(c), by the series of exp(2 a c / w):
        P_n(a) = exp(-a^2 / w) (2 / w)^(n / 2) a^n / sqrt(n!).
        """
        vectors = torch.stack((student.mT, teacher.mT))
        exponents = -vectors.square() / self.width
        powers = [exponents.exp()]
        for factor in self._series_factors(vectors.dtype):
            powers.append(powers[-1] * (vectors * factor))
        # The first is 1 but for little, which is all that differs: so the 1 is left to the sum.
        small = exponents.expm1()
        ours, theirs = torch.stack((small, *powers[1:]), dim=-2)
        total = torch.stack((small + 1, *powers[1:]), dim=-2).sum(0)
        return total, ours - theirs

    def _series_factors(self, dtype: torch.dtype) -> list[float]:
        """Return sqrt(2 / (w n)) for n = 1 up to where the terms, of a c <= 1, are rounding."""
        ratio, term = 2 / self.width, 1.0
        factors: list[float] = []
        while term > torch.finfo(dtype).eps or len(factors) < ratio:
            factors.append(math.sqrt(ratio / (len(factors) + 1)))
            term *= ratio / len(factors)
        return factors

    def _check_size(self, features: Tensor) -> None:
        channels, height, width = features.shape[1:]
        if min(channels, height * width) < self.k:
            raise ValueError(
                f"KDSVDLoss: maps {tuple(features.shape)} have fewer than k = {self.k} channels or "
                "positions"
            )


def _relation_loss(above: Pair, below: Pair) -> Tensor:
    """Return the sum over all pairs of channels of (r^s - r^t)^2.

    With r = P Q^T, P from one layer and Q from the other, the difference of the products is half of
    [P - P', P + P'] [Q + Q', Q - Q']^T, whose squared norm needs no pair of channels.
    """
    left, right = torch.cat(above[::-1], dim=-2), torch.cat(below, dim=-2)
    return ((left @ left.mT) * (right @ right.mT)).sum() / 4


def _turned(vectors: Tensor) -> Tensor:
    """Return vectors (B, C, k) with the signs that make their components add up to >= 0."""
    return torch.where(vectors.sum(1, keepdim=True) < 0, -vectors, vectors)
