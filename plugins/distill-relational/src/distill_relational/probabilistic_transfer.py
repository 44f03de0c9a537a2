"""Probabilistic knowledge transfer, Passalis and Tefas 2018: how likely samples are neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.parameters import check
from distill_relational.batch_relations import BatchRelationLoss, Gather, unit_vectors


class PKTLoss(BatchRelationLoss):
    r"""Divergence of the probabilities with which one sample would choose another as neighbour.

    .. math::
        u_i = \frac{f_i}{\|f_i\|_2 + \epsilon}, \quad
        p_{ij} = \frac{1 + u_i \cdot u_j}{\sum_k (1 + u_i \cdot u_k)}, \qquad
        L = \frac{1}{B^2} \sum_{ij} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}

    A sample is among its own neighbours. The mean is over all B² entries and not over rows, so the
    loss is small and its weight large.

    **Depends on the batch of one process**: neighbours are the samples that it has. Published
    numbers are of this kind. ``gather: all`` takes the samples of all processes.

    Args:
        eps: :math:`\epsilon` > 0.
        gather: ``"none"`` or ``"all"``, whose samples are related.

    Shape:
        - student_features: (B, D_s), or (B, ...), which is flattened; meant is what the classifier
          is given.
        - teacher_features: (B, D_t) or (B, ...).
        - returns: scalar, float32 or wider. Only the student gets a gradient. Vectors of zeros
          have a cosine of 0 with all others, and no gradient.

    Raises:
        ValueError: a parameter out of range; features that are not of the same batch.

    Weight 30000.

    Source: Passalis, Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*,
    ECCV 2018, https://arxiv.org/abs/1803.10837. The authors' code, RepDistiller, mdistiller and
    torchdistill agree.
    """

    def __init__(self, eps: float = 1e-7, gather: Gather = "none") -> None:
        super().__init__(gather)
        check(self, "eps", eps, 0 < eps < math.inf, "a finite number > 0")
        self.eps = eps

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the probabilities of neighbours."""
        ours, theirs = self._probabilities(student), self._probabilities(teacher)
        gap = theirs - ours
        divergence = -theirs * torch.log1p(-gap / (theirs + self.eps))
        # Gaps add up to 0 in each row. Without them every term is of second order, like the loss,
        # whose digits are lost among terms of first order that cancel.
        return (divergence - gap).mean()

    def _probabilities(self, vectors: Tensor) -> Tensor:
        units = unit_vectors(vectors, smallest=0.0, eps=self.eps)
        # Rounding takes the cosine of opposite vectors below -1.
        similarities = ((units @ units.T + 1) / 2).clamp_min(0)
        return similarities / similarities.sum(1, keepdim=True)
