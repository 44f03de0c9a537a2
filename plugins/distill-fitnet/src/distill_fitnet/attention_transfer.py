"""Attention transfer: where a network looks, as the energy of its maps at each position."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_fitnet.feature_pairs import Features, feature_pairs
from distill_fitnet.fitnet import check_weights, sum_over_layers
from distill_fitnet.map_sizes import pool_to_smaller
from distill_fitnet.parameters import check, check_choice

Form = Literal["code", "paper"]


class ATLoss(nn.Module):
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
        weights: one number >= 0 for each layer; by default 1 for all.

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
        weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, "form", form, get_args(Form))
        check_power(self, "power", power, whole=not abs_power)
        check_weights(self, weights)
        self.form = form
        self.power = power
        self.abs_power = abs_power
        self.weights = weights

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        losses = [self._distance(student, teacher) for student, teacher in pairs]
        return sum_over_layers(self, losses, self.weights)

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
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


def unit_vectors(features: Tensor, p: float = 2.0, dim: int = 1) -> Tensor:
    """Divide vectors along a dimension by their p-norm.

    A vector of zeros stays one. It is divided by 1 and not by a tiny number, which would multiply
    its gradient by 10^12.
    """
    norm: Tensor = torch.linalg.vector_norm(features, p, dim=dim, keepdim=True)
    return features / norm.masked_fill(norm == 0, 1.0)


def check_maps(owner: nn.Module, student: Tensor, teacher: Tensor) -> None:
    """Refuse what are not maps (B, C, H, W) of the same batch."""
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise ValueError(
            f"{type(owner).__name__}: the student's feature {tuple(student.shape)} and the "
            f"teacher's {tuple(teacher.shape)} must be maps (B, C, H, W) of the same batch; "
            "capture them before they are pooled and flattened"
        )


def check_power(owner: nn.Module, name: str, power: float, whole: bool) -> None:
    """Refuse powers below 1, and fractions where negative numbers are to be raised to them."""
    check(owner, name, power, 1 <= power < math.inf, "a finite number >= 1")
    if whole:
        check(owner, name, power, power % 1 == 0, "whole, since features may be negative")
