"""The feature part of DIST+: relations of maps by correlation."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from distill.parameters import check, check_choice
from distill_fitnet.feature_pairs import PairwiseLoss
from distill_fitnet.feature_shapes import check_maps, check_same

Form = Literal["one_minus", "torchdistill"]
Spatial = Literal["samples", "positions"]


class DISTPlusFeatureLoss(PairwiseLoss):
    r"""Pearson correlation between student's and teacher's maps, over channels and over space.

    .. math::
        L = \iota \, (1 - mean_{b,i} \, \rho_c(S_{bci}, T_{bci}))
            + \kappa \, (1 - mean_i \, \rho_b(\textstyle\sum_c S_{bci}, \sum_c T_{bci}))

    ``rho_x`` is the correlation along ``x``; ``i`` runs over positions. It belongs to DIST on the
    logits: torchdistill adds ``2 * (2 * inter + 2 * intra + this)`` to the cross entropy, with the
    maps of layer4. The teacher's acclimation, which the paper proposes besides, is not part of it.

    The only published code, torchdistill, has two peculiarities. Its channel term is the
    correlation itself, so it *rewards decorrelation*: ``form="torchdistill"``; the default is the
    evident intention. Its spatial term correlates over the samples of a batch, at each position,
    not over the positions of a sample; that is kept as the default, since the paper's text could
    not be compared, and ``spatial="positions"`` is the other reading. The former depends on the
    batch that one process sees.

    A vector without variation has no correlation: it counts as 0 and gives no gradient.

    Args:
        iota: weight of the channel term, >= 0.
        kappa: weight of the spatial term, >= 0.
        form: of the channel term: ``"one_minus"``, or ``"torchdistill"`` for the correlation.
        spatial: what the spatial term correlates over: ``"samples"`` or ``"positions"``.
        eps: norms count as at least this, > 0.

    Shape:
        - student_features, teacher_features: maps (B, C, H, W), the same for both; a list of each
          adds the layers up.
        - returns: scalar, computed in float32 or wider. Only the student gets gradients.

    Raises:
        ValueError: a parameter out of range; maps that do not fit each other.

    Source: Huang, You, Wang, Qian, Xu, *DIST+: Knowledge Distillation From a Stronger Adaptive
    Teacher*, TPAMI 2025, https://doi.org/10.1109/TPAMI.2025.3554235. ResNet-34 to ResNet-18 on
    ImageNet: 72.39 in the paper, 71.37 with torchdistill.
    """

    def __init__(
        self,
        iota: float = 1.0,
        kappa: float = 1.0,
        form: Form = "one_minus",
        spatial: Spatial = "samples",
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        check(self, "iota", iota, 0 <= iota < math.inf, "a finite number >= 0")
        check(self, "kappa", kappa, 0 <= kappa < math.inf, "a finite number >= 0")
        check_choice(self, "form", form, get_args(Form))
        check_choice(self, "spatial", spatial, get_args(Spatial))
        check(self, "eps", eps, 0 < eps < math.inf, "a finite number > 0")
        self.iota = iota
        self.kappa = kappa
        self.form = form
        self.spatial = spatial
        self.eps = eps

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return both terms of one layer."""
        advice = "adapt the student's channels: an auxiliary 1x1 Conv2d, or `adapter: auto`"
        check_maps(self, student, teacher, advice)
        check_same(self, student, teacher, "capture maps of the same height and width")
        channel = correlation(student, teacher, 1, self.eps).mean()
        if self.form == "one_minus":
            channel = 1 - channel
        sums = student.sum(1).flatten(1), teacher.sum(1).flatten(1)
        spatial = correlation(*sums, 0 if self.spatial == "samples" else 1, self.eps).mean()
        return self.iota * channel + self.kappa * (1 - spatial)


def correlation(first: Tensor, second: Tensor, dim: int, eps: float) -> Tensor:
    """Return the Pearson correlation of two tensors along a dimension, which goes away.

    Norms below ``eps`` count as ``eps``. Where ``first`` varies less than that, the result is 0 and
    so is the gradient, which otherwise would be of the order of ``1 / eps``.
    """
    first = first - first.mean(dim, keepdim=True)
    second = second - second.mean(dim, keepdim=True)
    squares = first.square().sum(dim), second.square().sum(dim)
    varies = squares[0] > eps**2
    # The clamp is inside the root: the root's own gradient is infinite at 0.
    norms = squares[0].clamp(min=eps**2).sqrt() * squares[1].clamp(min=eps**2).sqrt()
    return (first * second).sum(dim) * varies / norms
