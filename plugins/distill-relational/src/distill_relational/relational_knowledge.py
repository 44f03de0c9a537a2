"""Relational knowledge distillation, Park et al. 2019: distances and angles between samples."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from distill.parameters import check_choice, check_factor
from distill_relational.batch_relations import BatchRelationLoss, Gather, unit_vectors
from distill_relational.pair_distances import are_well_spread, compared, pair_distances
from distill_relational.relative_distances import distance_difference
from distill_relational.triplet_angles import angle_difference

Reduction = Literal["mean", "sum"]

WIDEST = 4096
"""Vectors up to so many numbers have distances in float32."""


class RelationalLoss(BatchRelationLoss):
    """What the losses of RKD take; see there."""

    related: ClassVar[int]
    """How many samples a relation is of."""
    spread: ClassVar[float]
    """Up to how many times the smallest distance the largest is for float32 to be enough."""

    def __init__(
        self,
        normalize_student: bool = False,
        normalize_teacher: bool = False,
        reduction: Reduction = "mean",
        gather: Gather = "none",
    ) -> None:
        super().__init__(gather)
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.normalize_student = normalize_student
        self.normalize_teacher = normalize_teacher
        self.reduction = reduction

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the distances of all pairs of samples, or what follows from them."""
        dtype, batch = student.dtype, len(student)
        vectors, distances = self.in_enough_digits(student, teacher)
        total = compared(
            vectors,
            distances,
            lambda pairs: self.compare(pairs, batch, dtype),
            1 / max(1, batch) ** self.related if self.reduction == "mean" else 1.0,
        )
        return total.to(dtype)

    def in_enough_digits(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``distances`` does, in float64 unless float32 is seen to be enough.

        It has too few of a distance that is small among others, or sums up many squares, and of
        vectors that were normalised. A host that looks at distances would wait for a GPU, and so
        it does not.
        """
        as_given = not (self.normalize_student or self.normalize_teacher)
        width = max(student.shape[1], teacher.shape[1])
        if student.device.type == "cpu" and as_given and width <= WIDEST:
            found = self.distances(student, teacher)
            if student.dtype == torch.float64 or are_well_spread(found[1], self.spread):
                return found
        wide = torch.float32 if student.device.type == "mps" else torch.float64
        return self.distances(student.to(wide), teacher.to(wide))

    def distances(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's vectors as they are compared, and the distances on both sides."""
        if self.normalize_student:
            student = unit_vectors(student)
        if self.normalize_teacher:
            teacher = unit_vectors(teacher)
        return student, torch.stack([pair_distances(side) for side in (student, teacher)])

    def compare(self, distances: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the sum over all relations, and its derivative by the student's squares (B, B).

        Args:
            distances: of the student's and the teacher's pairs (2, B * (B - 1) / 2).
            batch: B.
            dtype: the type of the features, in which triplets are compared.
        """
        raise NotImplementedError


class RKDDistanceLoss(RelationalLoss):
    r"""Difference of the distances between samples, each side in units of its own mean.

    .. math::
        d_{ij} = \frac{\|f_i - f_j\|_2}{\mu}, \quad
        \mu = \frac{1}{B (B - 1)} \sum_{i \ne j} \|f_i - f_j\|_2, \qquad
        L = \frac{1}{B^2} \sum_{ij} h(d^s_{ij} - d^t_{ij})

    h is the smooth L1 distance (half the square below 1). RKD adds ``RKDAngleLoss``: as terms of
    their own each has its line in the log, as ``RKDLoss`` both take less time.

    **Depends on the batch of one process**: pairs and mean are those of the samples that it has.
    Published numbers are of this kind. ``gather: all`` takes the samples of all processes.

    Args:
        normalize_student: whether to divide each of the student's vectors by its L2 norm.
        normalize_teacher: likewise. The authors' metric learning normalises the student alone,
            mmrazor both, the experiments on CIFAR-100 neither.
        reduction: ``"mean"`` as above, or ``"sum"`` without the division by B².
        gather: ``"none"`` or ``"all"``, whose samples are related.

    Shape:
        - student_features: (B, D_s), or (B, ...), which is flattened; meant are pooled features.
        - teacher_features: (B, D_t) or (B, ...).
        - returns: scalar, float32 or wider. Only the student gets a gradient, which cannot be
          differentiated again; none where two samples are equal (a squared distance counts as
          1e-12 at least). 0 for a single sample.

    Distances are float64. On a CPU they are float32 if on each side the largest is at most 1000
    times the smallest, vectors are not normalised and have up to 4096 numbers.

    Raises:
        ValueError: a parameter out of range; features that are not of the same batch.

    Weight 25, with 50 for the angles, on CIFAR-100 (RepDistiller) and ImageNet (mmrazor,
    normalised); 1 and 2 in metric learning and in torchdistill's sample.

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019,
    https://arxiv.org/abs/1904.05068, and the authors' code, with which those named agree.
    """

    related = 2
    # Gradients are then within 1e-6 of the largest element (of 64 vectors of 256 numbers, the
    # student's unlike the teacher's; where they are alike, both sides' rounding is what differs).
    spread = 1000.0

    def compare(self, distances: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compare distances in units of their mean."""
        return distance_difference(distances, batch)


class RKDAngleLoss(RelationalLoss):
    r"""Difference of the angles of all ordered triplets of samples.

    .. math::
        c_{jik} = \left\langle \frac{f_i - f_j}{\|f_i - f_j\|}, \frac{f_k - f_j}{\|f_k - f_j\|}
        \right\rangle, \qquad
        L = \frac{1}{B^3} \sum_{jik} h(c^s_{jik} - c^t_{jik})

    h is the smooth L1 distance (half the square below 1). Where two samples are equal there is no
    direction, and the cosine counts as 0.

    **Depends on the batch of one process**: triplets are those of the samples that it has.
    Published numbers are of this kind. ``gather: all`` takes the samples of all processes.

    Time grows with B³, whatever the width of the features, since the angles are found from the
    B² distances. Memory does not: angles are compared, and their gradient is computed, for
    max(2**22, B²) of them at a time (2**18 on a CPU). Beside the features in float64, in float32
    it takes 24 bytes for each of these and at most 64 for each of the B² distances: up to 352 MiB
    for batches up to 2048; measured on a CPU 10 MiB at 256, 22 at 512 and 89 at 1024.

    Distances are float64, since close samples need it, and angles float32. On a CPU, distances are
    float32 too if on each side the largest is at most 8 times the smallest, vectors are not
    normalised and have up to 4096 numbers, which takes two thirds of the memory. On ``mps``, which
    has no float64, gradients at samples that are close to each other lose digits.

    Args:
        normalize_student: whether to divide each of the student's vectors by its L2 norm.
        normalize_teacher: likewise. The authors' metric learning normalises the student alone,
            mmrazor both, the experiments on CIFAR-100 neither.
        reduction: ``"mean"`` as above, or ``"sum"`` without the division by B³.
        gather: ``"none"`` or ``"all"``, whose samples are related.

    Shape:
        - student_features: (B, D_s), or (B, ...), which is flattened; meant are pooled features.
        - teacher_features: (B, D_t) or (B, ...).
        - returns: scalar, float32 or wider. Only the student gets a gradient, which cannot be
          differentiated again. 0 for one sample or two.

    Raises:
        ValueError: a parameter out of range; features that are not of the same batch.

    Weight 50, with 25 for the distances, on CIFAR-100 (RepDistiller) and ImageNet (mmrazor,
    normalised); 2 and 1 in metric learning and in torchdistill's sample.

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019,
    https://arxiv.org/abs/1904.05068, and the authors' code, with which those named agree.
    """

    related = 3
    # Gradients are then within 2e-6 of the largest element (3e-6 at 16, 7e-6 at 32), as above.
    spread = 8.0

    def compare(self, distances: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compare the angles that distances make."""
        return angle_difference(distances, batch, dtype)


class RKDLoss(RelationalLoss):
    r"""Both losses of RKD on the same features, in less time than as two terms.

    .. math::
        L = \alpha L_{RKDDistanceLoss} + \beta L_{RKDAngleLoss}, \quad
        \alpha = \text{distance\_weight}, \ \beta = \text{angle\_weight}

    See there for both. Distances are found once, and the gradient is one product of matrices; time
    and memory are those of the angles. The log has the sum alone.

    **Depends on the batch of one process**: pairs and triplets are those of the samples that it
    has. Published numbers are of this kind. ``gather: all`` takes the samples of all processes.

    Distances are of the type that ``RKDAngleLoss`` takes them in.

    Args:
        normalize_student: whether to divide each of the student's vectors by its L2 norm.
        normalize_teacher: likewise.
        reduction: ``"mean"`` over the B² pairs and over the B³ triplets, or ``"sum"``.
        gather: ``"none"`` or ``"all"``, whose samples are related.
        distance_weight: the weight of distances, >= 0.
        angle_weight: that of angles, >= 0.

    Shape:
        - student_features: (B, D_s), or (B, ...), which is flattened; meant are pooled features.
        - teacher_features: (B, D_t) or (B, ...).
        - returns: scalar, float32 or wider. Only the student gets a gradient, which cannot be
          differentiated again.

    Raises:
        ValueError: a parameter out of range; features that are not of the same batch.

    Weights 1 and 2 in metric learning and in torchdistill's sample, which calls them
    ``distance_factor`` and ``angle_factor``; 25 and 50 on CIFAR-100 (RepDistiller) and ImageNet
    (mmrazor, normalised).

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019,
    https://arxiv.org/abs/1904.05068, and the authors' code, with which those named agree.
    """

    related = RKDAngleLoss.related
    spread = RKDAngleLoss.spread

    def __init__(
        self,
        normalize_student: bool = False,
        normalize_teacher: bool = False,
        reduction: Reduction = "mean",
        gather: Gather = "none",
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
    ) -> None:
        super().__init__(normalize_student, normalize_teacher, reduction, gather)
        check_factor(self, "distance_weight", distance_weight)
        check_factor(self, "angle_weight", angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def compare(self, distances: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compare distances, and the angles that they make."""
        angles, by_angles = angle_difference(distances, batch, dtype)
        pairs, by_pairs = distance_difference(distances, batch)
        # The mean is taken over triplets, of which there are B for each pair.
        share = self.distance_weight * (batch if self.reduction == "mean" else 1)
        return (
            angles.mul_(self.angle_weight).add_(pairs, alpha=share),
            by_angles.mul_(self.angle_weight).add_(by_pairs, alpha=share),
        )
