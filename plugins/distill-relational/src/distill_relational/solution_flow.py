"""Flow of the solution procedure (FSP), Yim et al. 2017: how one layer leads to the next."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.parameters import Parametrized, check_choice, check_layer_weights
from distill_relational.batch_relations import full_precision, in_one_type
from distill_relational.feature_pairs import Features, in_layers, sum_over_layers

Form = Literal["mse", "paper", "torchdistill"]
Pooling = Literal["average", "max"]


class FSPLoss(Parametrized):
    r"""Difference of the products of two layers' maps, summed over pairs of layers.

    .. math::
        G = \frac{1}{H W} \sum_{h,w} F^1_{hw} \otimes F^2_{hw}, \qquad
        L = \sum_l \frac{w_l}{B C_1 C_2} \sum_b \| G_s - G_t \|_F^2

    Within a network, the larger of the two maps is pooled to the size of the smaller. Student and
    teacher may have maps of different size, but both layers need as many channels.

    Does **not** depend on the batch of one process: it is a mean over samples.

    Args:
        form: what is made of the differences.

            ================ ================================================================
            ``mse``          as above: mean squares, as in RepDistiller
            ``paper``        the squared norm of a sample's difference, so C_1 C_2 times ``mse``
            ``torchdistill`` for each sample, the norms of the difference's C_2 columns, added up
                             without a square
            ================ ================================================================
        pooling: ``"average"``, as in RepDistiller, or ``"max"``, as in the paper and torchdistill.
            ``None`` takes the average for ``mse`` and the maximum for the others.
        layer_weights: one number >= 0 for each pair of layers; by default 1 for all.

    Shape:
        - student_first: the first layer's map (B, C_1, H, W), or a list with one for each pair.
        - student_second: the second layer's (B, C_2, H', W'), likewise. Where a layer is the second
          of one pair and the first of the next, it stands in both lists.
        - teacher_first, teacher_second: likewise, of the student's channels.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; not as many features, or weights, as pairs; features
            that are no maps, not of the same batch, or of other channels.

    Meant for a stage of its own, in which the student's body learns by this loss alone, before a
    stage with the labels. Its weight then hardly matters.

    Source: Yim et al., *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
    and Transfer Learning*, CVPR 2017,
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html.
    """

    def __init__(
        self,
        form: Form = "mse",
        pooling: Pooling | None = None,
        layer_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, "form", form, get_args(Form))
        if pooling is not None:
            check_choice(self, "pooling", pooling, get_args(Pooling))
        check_layer_weights(self, layer_weights)
        self.form = form
        self.pooling = pooling
        self.layer_weights = layer_weights

    def forward(
        self,
        student_first: Features,
        student_second: Features,
        teacher_first: Features,
        teacher_second: Features,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        layers = in_layers(
            self,
            student_first=student_first,
            student_second=student_second,
            teacher_first=teacher_first,
            teacher_second=teacher_second,
        )
        losses = [self._pair_loss(*maps) for maps in layers]
        return sum_over_layers(self, losses, self.layer_weights)

    def _pair_loss(
        self, student_first: Tensor, student_second: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        student_first, student_second, first, second = in_one_type(
            student_first, student_second, first.detach(), second.detach()
        )
        self._check_channels((student_first, student_second), (first, second))
        with full_precision(student_first):
            ours, theirs = self._flow(student_first, student_second), self._flow(first, second)
            difference = ours - theirs
            if self.form == "mse":
                return difference.square().mean()
            if self.form == "paper":
                return difference.square().sum() / len(difference)
            norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
            return norms.sum() / len(difference)

    def _flow(self, first: Tensor, second: Tensor) -> Tensor:
        height, width = map(min, first.shape[2:], second.shape[2:])
        rows, others = (
            self._pooled(features, (height, width)).flatten(2) for features in (first, second)
        )
        return torch.bmm(rows, others.mT) / (height * width)

    def _pooled(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(features.shape[2:]) == size:
            return features
        average = self.form == "mse" if self.pooling is None else self.pooling == "average"
        pool = F.adaptive_avg_pool2d if average else F.adaptive_max_pool2d
        pooled: Tensor = pool(features, size)
        return pooled

    def _check_channels(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> None:
        shapes = [[tuple(feature.shape[:2]) for feature in side] for side in (student, teacher)]
        if shapes[0] != shapes[1] or len({batch for batch, _ in shapes[0]}) > 1:
            ours, theirs = (
                " and ".join(str(tuple(feature.shape)) for feature in side)
                for side in (student, teacher)
            )
            raise ValueError(
                f"FSPLoss: the student's {ours} and the teacher's {theirs} must be of the same "
                "batch and have as many channels; bring the student's there with a 1x1 "
                "convolution, or let 'adapter: auto' on the term do so"
            )
