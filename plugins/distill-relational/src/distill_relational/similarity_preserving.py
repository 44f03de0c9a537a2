"""Similarity-preserving distillation, Tung and Mori 2019: which samples activate alike."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from distill.parameters import check, check_choice
from distill_relational.batch_relations import BatchRelationLoss, Gather, unit_vectors

Reduction = Literal["batchmean", "sum"]


class SPKDLoss(BatchRelationLoss):
    r"""Squared difference of the samples' similarities, normalised row by row.

    .. math::
        G = F F^\top, \quad \hat G_i = \frac{G_i}{\|G_i\|_p}, \qquad
        L = \frac{1}{B^2} \| \hat G_s - \hat G_t \|_F^2

    F has a flattened feature of each sample as a row.

    **Depends on the batch of one process**: similarities are between the samples that it has.
    Published numbers are of this kind. ``gather: all`` takes the samples of all processes.

    Args:
        p: the norm of rows, 2 or 1. The paper has 2, and so has the code that its numbers come
            from. torchdistill has 1, since it gives the dimension in the place of the norm.
        reduction: ``"batchmean"`` as above, or ``"sum"`` without the division by B².
        gather: ``"none"`` or ``"all"``, whose samples are related.

    Shape:
        - student_features: (B, ...), meant is the last map, after the activation.
        - teacher_features: (B, ...), of any shape behind B.
        - returns: scalar, float32 or wider. Only the student gets a gradient. Samples of zeros have
          similarities of 0; a sample counts as zeros where its products with all samples have a
          norm of 1e-12 or less, as for features of about 1e-7.

    Raises:
        ValueError: a parameter out of range; features that are not of the same batch.

    Weight 3000 on CIFAR-100 (RepDistiller).

    Source: Tung, Mori, *Similarity-Preserving Knowledge Distillation*, ICCV 2019,
    https://arxiv.org/abs/1907.09682.
    """

    def __init__(
        self, p: int = 2, reduction: Reduction = "batchmean", gather: Gather = "none"
    ) -> None:
        super().__init__(gather)
        check(self, "p", p, p in (1, 2), "1 or 2")
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.p = p
        self.reduction = reduction

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the rows of similarities."""
        difference = self._similarities(student) - self._similarities(teacher)
        squares = difference.square()
        return squares.mean() if self.reduction == "batchmean" else squares.sum()

    def _similarities(self, vectors: Tensor) -> Tensor:
        return unit_vectors(vectors @ vectors.T, float(self.p))
