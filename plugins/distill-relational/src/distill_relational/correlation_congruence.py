"""Correlation congruence, Peng et al. 2019: how samples correlate in an embedding of each side."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.parameters import Parametrized, check, check_channels, check_choice
from distill_relational.batch_relations import (
    BatchRelationLoss,
    Gather,
    unit_vectors,
)

Form = Literal["paper", "torchdistill", "code"]
Kernel = Literal["gaussian", "bilinear"]
Reduction = Literal["batchmean", "sum"]


class CCKDEmbedding(Parametrized):
    """Embed features by a linear layer with a bias; each side has one of its own.

    Args:
        in_features: width of the flattened features; ``None`` finds it in ``setup``.
        out_features: width of the embedding.

    Shape:
        - features: (B, D), or (B, ...), which is flattened; meant are pooled features.
        - returns: (B, out_features).

    Raises:
        ValueError: a width below 1, or features of another width than the layer has.
        RuntimeError: ``forward`` before the width is known.

    Source: Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019,
    https://arxiv.org/abs/1904.01802; 128 as in RepDistiller and torchdistill. Both train the
    teacher's embedding as well; ``frozen: true`` keeps it a random projection.
    """

    def __init__(self, in_features: int | None = None, out_features: int = 128) -> None:
        super().__init__()
        check_channels(self, "in_features", in_features)
        check(self, "out_features", out_features, out_features >= 1, "a whole number >= 1")
        self.in_features = in_features
        self.out_features = out_features
        self.linear: nn.Linear | None = None
        if in_features is not None:
            self.linear = nn.Linear(in_features, out_features)

    def setup(self, features: Tensor) -> None:
        """Build the layer for these features, or check that the one there is fits them."""
        width = features.flatten(1).shape[1]
        if self.linear is None:
            self.in_features = width
            self.linear = nn.Linear(width, self.out_features)
        self._check_width(width, features)
        self.linear.to(features.device, torch.promote_types(features.dtype, torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Return the embedding of a batch; see the class for shapes."""
        if self.linear is None:
            raise RuntimeError(
                "CCKDEmbedding has no layer yet: call setup with features, or give in_features"
            )
        flat = features.flatten(1)
        self._check_width(flat.shape[1], features)
        embedded: Tensor = self.linear(flat.to(self.linear.weight.dtype))
        return embedded

    def _check_width(self, width: int, features: Tensor) -> None:
        if width != self.in_features:
            raise ValueError(
                f"CCKDEmbedding: in_features is {self.in_features}, but features of shape "
                f"{tuple(features.shape)} have {width}"
            )


class CCKDLoss(BatchRelationLoss):
    r"""Difference of the samples' correlations, measured by a kernel on embeddings.

    .. math::
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} (u_i \cdot u_j)^p, \qquad
        L = \frac{1}{B^2} \| K_s - K_t \|_F^2

    K is the Taylor series of a Gaussian kernel on vectors u of length 1.

    **Depends on the batch of one process**: correlations are between the samples that it has.
    Published numbers are of this kind. ``gather: all`` takes the samples of all processes. The
    paper wants batches of a few classes with several samples each: ``ClassesPerBatchSampler``.

    Gradients go to **both sides**, for the teacher's embedding is trained, too. The teacher itself
    gets none in a stage; elsewhere, compute its features under ``torch.no_grad``.

    Args:
        form: which of three losses under this name.

            ================ =================================================================
            ``paper``        as above
            ``torchdistill`` vectors as they are, and the norm without a square:
                             :math:`\|K_s - K_t\|_F / B^2`
            ``code``         the authors' code, with which RepDistiller's numbers were made. No
                             kernel; with :math:`\delta_i = |f^s_i - f^t_i|` in each dimension, the
                             mean of :math:`\delta_i \cdot \delta_{i+1}` over samples next to each
                             other. Embeddings must be equally wide.
            ================ =================================================================
        kernel: ``"gaussian"`` as above, or ``"bilinear"``, which is :math:`u_i \cdot u_j`. Not for
            ``code``.
        gamma: :math:`\gamma` > 0 of the Gaussian kernel.
        max_p: P >= 1, the highest power of its series.
        normalize: whether to divide vectors by their L2 norm; ``None`` does as the form says. Not
            for ``code``.
        reduction: ``"batchmean"`` as above; ``"sum"`` without the division by B² (for ``code``, by
            B - 1).
        gather: ``"none"`` or ``"all"``, whose samples are related.

    Shape:
        - student_features: embeddings (B, D), or (B, ...), which is flattened.
        - teacher_features: likewise, of any width.
        - returns: scalar, float32 or wider. Vectors of zeros correlate with nothing.

    Raises:
        ValueError: a parameter out of range; features that are not of the same batch, or for
            ``code`` not equally wide.

    Weight 0.02 for ``code`` on CIFAR-100 (RepDistiller); 0.003 in torchdistill's sample, beside the
    teacher's soft targets alone.

    Source: Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019,
    https://arxiv.org/abs/1904.01802.
    """

    trains_teacher_side = True

    def __init__(
        self,
        form: Form = "paper",
        kernel: Kernel = "gaussian",
        gamma: float = 0.4,
        max_p: int = 2,
        normalize: bool | None = None,
        reduction: Reduction = "batchmean",
        gather: Gather = "none",
    ) -> None:
        super().__init__(gather)
        check_choice(self, "form", form, get_args(Form))
        check_choice(self, "kernel", kernel, get_args(Kernel))
        check(self, "gamma", gamma, 0 < gamma < math.inf, "a finite number > 0")
        check(self, "max_p", max_p, max_p >= 1, "a whole number >= 1")
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.form = form
        self.kernel = kernel
        self.gamma = gamma
        self.max_p = max_p
        self.normalize = normalize
        self.reduction = reduction

    def relation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare correlations, or neighbours' differences, as the form says."""
        if self.form == "code":
            return self._neighbours_loss(student, teacher)
        difference = self._correlations(student) - self._correlations(teacher)
        if self.form == "paper":
            total = difference.square().sum()
        else:
            total = torch.linalg.vector_norm(difference)
        return total / len(student) ** 2 if self.reduction == "batchmean" else total

    def _neighbours_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"CCKDLoss: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must "
                "be equally wide for form 'code'; embed both with CCKDEmbedding"
            )
        apart = (student - teacher).abs()
        total = (apart[:-1] * apart[1:]).sum()
        return total / max(1, len(apart) - 1) if self.reduction == "batchmean" else total

    def _correlations(self, vectors: Tensor) -> Tensor:
        normalize = self.form == "paper" if self.normalize is None else self.normalize
        if normalize:
            vectors = unit_vectors(vectors)
        products = vectors @ vectors.T
        return products if self.kernel == "bilinear" else self._series(products)

    def _series(self, products: Tensor) -> Tensor:
        scale = math.exp(-2 * self.gamma)
        factors = [scale * (2 * self.gamma) ** p / math.factorial(p) for p in range(self.max_p + 1)]
        series = products * factors[-1] + factors[-2]
        for factor in reversed(factors[:-2]):
            series = series * products + factor
        return series
