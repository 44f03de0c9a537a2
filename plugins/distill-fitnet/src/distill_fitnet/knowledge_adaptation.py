"""Knowledge adaptation with affinity distillation, for segmentation."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import Parametrized, check, check_choice
from distill_fitnet.feature_pairs import PairwiseLoss
from distill_fitnet.feature_shapes import check_maps, check_same
from distill_fitnet.fitnet import ConvRegressor
from distill_fitnet.map_sizes import pool_to_smaller
from distill_fitnet.powers import check_power
from distill_fitnet.vectors import Reduction, unit_vectors, vector_distance

AffinityForm = Literal["channels", "positions"]


class KTAAdapter(ConvRegressor):
    """3x3 convolution, batch norm and ReLU from a student's maps to the teacher's code.

    The student's side of knowledge adaptation has two: one for ``KTALoss``, one for
    ``AffinityLoss``. The teacher's side is a ``Paraphraser`` with ``batch_norm: true``, whose
    ``factor`` is the code.

    Args:
        in_channels: channels of the student's maps, by default found on the first two samples.
        out_channels: channels of the code; by default those of ``like``.
        batch_norm: whether to normalise by the batch.
        relu: whether to end with a ReLU. torchdistill's adapter does, while its code comes out of
            a leaky ReLU and so may be negative.

    Shape:
        - features: (B, C_s, H, W).
        - like: the code (B, C, H, W), of which only the shape is used; a student's map of another
          size is interpolated to it.
        - returns: (B, C, H, W).

    Raises:
        ValueError: a parameter out of range; features of other channels than the parameters say.
        RuntimeError: used before its shapes are known.

    Source: He et al., *Knowledge Adaptation for Efficient Semantic Segmentation*, CVPR 2019,
    https://arxiv.org/abs/1903.04688.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        batch_norm: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, batch_norm=batch_norm, relu=relu)


class KTALoss(PairwiseLoss):
    r"""Difference of the student's adapted feature and the teacher's code, both normalised.

    .. math::
        L = \frac{1}{B D} \sum \left| \frac{a}{\|a\|_q} - \frac{e}{\|e\|_q} \right|

    with a and e the maps of a sample as vectors of D numbers. With q = 2 this is ``FTLoss``.

    Args:
        p: 1 for the absolute difference, a mean or sum over all elements as ``reduction`` says;
            any larger number for the p-norm of each sample's difference, a mean or sum over
            samples.
        q: the norm that vectors are divided by, >= 1.
        reduction: ``"mean"`` or ``"sum"``.

    Shape:
        - student_features, teacher_features: of the same shape (B, ...), or as many of them in
          lists, one for each layer.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; not as many features of one as of the other; features
            of different shapes.

    torchdistill weighs it with 50, beside the cross entropy and ``AffinityLoss`` with 1.

    Source: He et al., CVPR 2019, https://arxiv.org/abs/1903.04688.
    """

    def __init__(self, p: float = 1.0, q: float = 2.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_power(self, "p", p)
        check_power(self, "q", q)
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.p = p
        self.q = q
        self.reduction = reduction

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the difference of one layer's features."""
        check_same(self, student, teacher, "bring the student's there with a KTAAdapter")
        student, teacher = (unit_vectors(f.flatten(1), self.q) for f in (student, teacher))
        return vector_distance(student, teacher, self.p, self.reduction)


class AffinityLoss(PairwiseLoss):
    r"""Difference of two features' affinities.

    .. math::
        L_{channels} = \frac{1}{B} \sum_b \sum_c
            \frac{1}{HW} \| \hat a_c \hat a_c^T - \hat b_c \hat b_c^T \|_F, \qquad
        L_{positions} = \frac{1}{B} \sum_b \frac{1}{HW}
            \| \hat A^T \hat A - \hat B^T \hat B \|_F

    In the form ``channels`` (torchdistill, which gives the published number) each channel is a
    vector over positions, divided by its norm. In the form ``positions`` (the paper, to the best of
    our knowledge; not compared with its text) each position is a vector over channels, divided by
    its norm, and the affinity of two positions is their product.

    Maps of different size are average-pooled to the smaller one first.

    Args:
        form: ``"channels"``, in time and memory proportional to the maps: the HW x HW matrices are
            never made; or ``"positions"``, with one such matrix for each sample.
        reduction: ``"mean"`` or ``"sum"`` over the batch.
        pool: average-pool both maps over squares of this many positions first, which makes the
            matrices of ``"positions"`` pool^4 times smaller.

    Shape:
        - student_features, teacher_features: maps (B, C, H, W), of the same channels for the form
          ``channels``; or as many of them in lists, one for each layer.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; not as many features of one as of the other; features
            that are no maps, of different batches or, where they matter, different channels.

    Where both affinities are equal the loss is 0 and so is its gradient, though it has a kink.

    Source: He et al., CVPR 2019, https://arxiv.org/abs/1903.04688.
    """

    def __init__(
        self,
        form: AffinityForm = "channels",
        reduction: Reduction = "mean",
        pool: int = 1,
    ) -> None:
        super().__init__()
        check_choice(self, "form", form, get_args(AffinityForm))
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check(self, "pool", pool, pool >= 1, "a whole number >= 1")
        self.form = form
        self.reduction = reduction
        self.pool = pool

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the difference of one layer's affinities."""
        check_maps(self, student, teacher)
        student, teacher = (
            self._pooled(features).flatten(2) for features in pool_to_smaller(student, teacher)
        )
        if self.form == "channels":
            check_same(self, student, teacher, "bring the student's there with a KTAAdapter")
            student, teacher = unit_vectors(student, dim=2), unit_vectors(teacher, dim=2)
            norms = outer_distance(student, teacher).sum(1)
        else:
            difference = _affinity(student) - _affinity(teacher)
            norms = torch.linalg.vector_norm(difference, dim=(1, 2))
        norm = norms.mean() if self.reduction == "mean" else norms.sum()
        return norm / student.shape[2]

    def _pooled(self, features: Tensor) -> Tensor:
        if self.pool == 1:
            return features
        return F.avg_pool2d(features, self.pool, ceil_mode=True)


class CodeNormLoss(Parametrized):
    r"""Norm of a code, which keeps an auto-encoder's codes small or sparse.

    .. math::
        L = \left( \sum |code|^p \right)^{1/p}

    over the whole tensor, the batch included: with p = 1 it grows with the batch.

    Args:
        p: a number >= 1.

    Shape:
        - code: any shape, such as the ``factor`` of a ``Paraphraser``. It gets a gradient.
        - returns: scalar, float32 or wider.

    Raises:
        ValueError: p is out of range.

    torchdistill weighs it with 1e-7 beside the reconstruction error.

    Source: He et al., CVPR 2019, https://arxiv.org/abs/1903.04688.
    """

    def __init__(self, p: float = 1.0) -> None:
        super().__init__()
        check_power(self, "p", p)
        self.p = p

    def forward(self, code: Tensor) -> Tensor:
        """Return the norm as a scalar."""
        wide = code.to(torch.promote_types(code.dtype, torch.float32))
        norm: Tensor = torch.linalg.vector_norm(wide, self.p)
        return norm


def outer_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""Return :math:`\|a a^T - b b^T\|_F` of vectors along the last dimension.

    With u = a - b and v = a + b the difference is (u v^T + v u^T) / 2, of squared norm
    (|u|^2 |v|^2 + (u.v)^2) / 2: no subtraction is left in which nearly equal vectors would lose
    their digits, as (a.a)^2 + (b.b)^2 - 2 (a.b)^2 would.
    """
    u, v = a - b, a + b
    lengths = torch.linalg.vector_norm(u, dim=-1) * torch.linalg.vector_norm(v, dim=-1)
    # A norm of two numbers and not the root of their squares: that has no finite slope at 0.
    parts = torch.stack((lengths, (u * v).sum(-1)))
    norm: Tensor = torch.linalg.vector_norm(parts, dim=0)
    return norm / math.sqrt(2)


def _affinity(features: Tensor) -> Tensor:
    vectors = unit_vectors(features, dim=1)
    return vectors.transpose(1, 2) @ vectors
