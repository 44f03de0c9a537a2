"""Distillation by singular value decomposition, Lee et al. 2018: how layers' main axes relate."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_fitnet.feature_pairs import Features, Pair, feature_pairs, sum_over_layers
from distill_fitnet.feature_shapes import check_maps
from distill_fitnet.parameters import Parametrized, check
from distill_fitnet.vectors import unit_vectors


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

    Each sample's map needs a decomposition, of a matrix of its channels or positions, whichever are
    fewer. That is slow, and on a GPU it makes the host wait.

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
            vectors = [self._aligned(*pair) for pair in pairs]
            losses = [self._relation_loss(above, below) for below, above in pairwise(vectors)]
        return sum_over_layers(self, losses) / len(pairs[0][0])

    def _aligned(self, student: Tensor, teacher: Tensor) -> Pair:
        """Return the vectors (B, C, k) of student and teacher that belong together."""
        check_maps(
            self, student, teacher, "bring the student's to the teacher's by a 1x1 convolution"
        )
        self._check_size(student)
        self._check_size(teacher)
        target, values = right_singular_vectors(teacher, self.k)
        target = torch.where(target.sum(1, keepdim=True) < 0, -target, target)
        candidates, _ = right_singular_vectors(student, self.k + self.spare)
        cosines = candidates.detach().mT @ target
        best = cosines.abs().argmax(dim=1, keepdim=True)
        chosen = candidates.gather(2, best.expand(-1, target.shape[1], -1))
        scale = F.normalize(values, dim=1).unsqueeze(1)
        return chosen * cosines.gather(1, best).sign() * scale, target * scale

    def _relation_loss(self, above: Pair, below: Pair) -> Tensor:
        student, teacher = (
            self._relations(high.mT, low.mT) for high, low in zip(above, below, strict=True)
        )
        return F.mse_loss(student, teacher, reduction="sum")

    def _relations(self, high: Tensor, low: Tensor) -> Tensor:
        """Return exp(-(h_a - l_c)^2 / w) for all pairs of channels, (B, k, C, C')."""
        # The square is multiplied out: so one product gives the exponent of all pairs, which are
        # the many numbers here.
        one = torch.ones_like
        left = torch.stack((2 * high, -high.square(), -one(high)), dim=-1) / self.width
        right = torch.stack((low, one(low), low.square()), dim=-2)
        return (left @ right).exp_()

    def _check_size(self, features: Tensor) -> None:
        channels, height, width = features.shape[1:]
        if min(channels, height * width) < self.k:
            raise ValueError(
                f"KDSVDLoss: maps {tuple(features.shape)} have fewer than k = {self.k} channels or "
                "positions"
            )


def right_singular_vectors(features: Tensor, count: int) -> Pair:
    """Return the first singular vectors on the side of the channels, and the singular values.

    Args:
        features: maps (B, C, H, W), seen as matrices A of H * W rows and C columns.
        count: how many; at most as many as there are are returned.

    Returns:
        Vectors (B, C, count), with a gradient, and values (B, count), without. A vector whose
        singular value is 0 is 0.
    """
    rows = features.flatten(2)
    if rows.shape[1] <= rows.shape[2]:
        vectors, squares = leading_eigenvectors(rows, count)
    else:
        # The other side has less to decompose: v_i is A^T u_i, divided by its norm.
        positions, squares = leading_eigenvectors(rows.mT, count)
        vectors = unit_vectors(rows @ positions, smallest=torch.finfo(rows.dtype).tiny)
    return vectors, squares.clamp(min=0).sqrt()


def leading_eigenvectors(rows: Tensor, count: int) -> Pair:
    """Return eigenvectors (B, N, count) of R R^T by falling eigenvalue, and these values.

    The vectors have a gradient, that of perturbation theory: with M = R R^T, v_i moves by the sum
    over j of v_j (v_j . dM v_i) / (value_i - value_j).

    Args:
        rows: R, (B, N, M).
        count: how many; at most N are returned.
    """
    with torch.no_grad():
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(rows @ rows.mT))
    first, leading = vectors[:, :, :count], values[:, :count]
    if rows.requires_grad:
        change = rows @ (rows.mT @ first)
        along = vectors.mT @ (change - change.detach())
        along = along * _damped_inverse(leading.unsqueeze(1), values.unsqueeze(2))
        first = first + vectors @ along
    return first, leading


def _damped_inverse(value: Tensor, other: Tensor) -> Tensor:
    """Return 1 / (value - other), falling to 0 where rounding hides the difference."""
    limits = torch.finfo(value.dtype)
    gap = value - other
    noise = limits.eps * torch.maximum(value, other).square()
    return gap / (gap.square() + noise).clamp(min=limits.tiny)
