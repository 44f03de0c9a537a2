"""Attention transfer: where a network looks, as the energy of its maps at each position."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import check_choice, check_layer_weights
from distill_fitnet.feature_pairs import PairwiseLoss
from distill_fitnet.feature_shapes import check_maps
from distill_fitnet.map_sizes import pool_to_smaller
from distill_fitnet.powers import check_power
from distill_fitnet.vectors import unit_vectors

Form = Literal["code", "paper"]


class ATLoss(PairwiseLoss):
    r"""Difference of normalised attention maps, summed over layers.

    .. math::
        q = \frac{Q}{\|Q\|_2}, \quad Q = \frac{1}{C} \sum_c F_c^{power}, \qquad
        L_{code} = \sum_l w_l \, mean_{b,i} (q_s - q_t)^2, \qquad
        L_{paper} = \sum_l \frac{w_l}{B} \sum_b \| q_s - q_t \|_2

    Maps of different size are average-pooled to the smaller one first. Channels may differ.

    Args:
        form: ``"code"``, the authors' code, which gives the published accuracies with a weight of
            1000; or ``"paper"``, the equation of the paper without its factor of beta / 2, which
            does not reproduce them. The mean over positions makes the code's loss of a layer
            smaller the larger its maps are.
        power: a number >= 1 that channels are raised to; a whole one unless ``abs_power``.
        abs_power: whether to take the absolute value first, as the paper's definition does and its
            code does not. It matters for odd powers of features with a sign.
        layer_weights: one number >= 0 for each layer; by default 1 for all.

    Shape:
        - student_features, teacher_features: maps (B, C, H, W), or as many of them in lists, one
          for each layer; after the activation, as published.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; not as many features, or weights, as layers; features
            that are no maps or of different batches.

    A map of zeros has an attention of zeros.

    Source: Zagoruyko, Komodakis, *Paying More Attention to Attention*, ICLR 2017,
    https://arxiv.org/abs/1612.03928. The authors' code sums over the processes' losses, so its
    documented two GPUs double the weight; nothing is doubled here.
    """

    def __init__(
        self,
        form: Form = "code",
        power: float = 2.0,
        abs_power: bool = False,
        layer_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, "form", form, get_args(Form))
        check_power(self, "power", power, whole=not abs_power)
        check_layer_weights(self, layer_weights)
        self.form = form
        self.power = power
        self.abs_power = abs_power
        self.layer_weights = layer_weights

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the difference of one layer's attention maps."""
        check_maps(self, student, teacher)
        student, teacher = (
            attention(features, self.power, self.abs_power)
            for features in pool_to_smaller(student, teacher)
        )
        if self.form == "code":
            return F.mse_loss(student, teacher)
        norms: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
        return norms.mean()


def attention(features: Tensor, power: float, absolute: bool = False) -> Tensor:
    """Return the normalised attention (B, H * W) of maps (B, C, H, W)."""
    if absolute:
        features = features.abs()
    # The mean and the sum over channels are the same once normalised.
    return unit_vectors(features.pow(power).mean(1).flatten(1))
