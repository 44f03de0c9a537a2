"""Student's and teacher's features, one of each or a list of each, as pairs to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.parameters import Parametrized

Features = Tensor | Sequence[Tensor]
"""One feature, or one for each of several layers."""

Pair = tuple[Tensor, Tensor]


class PairwiseLoss(Parametrized):
    """A loss of features that is the sum, weighed if so asked, of what each layer's pair gives."""

    layer_weights: Sequence[float] | None = None

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one layer, from features as ``feature_pairs`` makes them."""
        raise NotImplementedError

    def weights_of(self, layers: int) -> Sequence[float] | None:
        """Return a weight for each of so many layers, or ``None`` for 1."""
        return self.layer_weights

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        losses = [self.layer_loss(*pair) for pair in pairs]
        return sum_over_layers(self, losses, self.weights_of(len(pairs)))


def as_list(features: Features) -> list[Tensor]:
    """Return features as a list, whether one or several were given."""
    return [features] if isinstance(features, Tensor) else list(features)


def feature_pairs(student_features: Features, teacher_features: Features) -> list[Pair]:
    """Pair student's and teacher's features, layer by layer, ready for a loss.

    Both come back in one type, float32 or wider, since half precision loses the small differences
    that losses are made of; the teacher's without a gradient.

    Raises:
        ValueError: if there are not as many of one as of the other, or none.
    """
    students, teachers = as_list(student_features), as_list(teacher_features)
    if len(students) != len(teachers):
        raise ValueError(
            f"{len(students)} features of the student cannot be paired with {len(teachers)} of "
            "the teacher"
        )
    if not students:
        raise ValueError("features of one layer at least are needed, got none")
    return [_comparable(s, t) for s, t in zip(students, teachers, strict=True)]


def sum_over_layers(
    owner: object, losses: Sequence[Tensor], layer_weights: Sequence[float] | None = None
) -> Tensor:
    """Return the sum of the layers' losses, each times its weight.

    Raises:
        ValueError: if there are not as many weights as layers.
    """
    if layer_weights is not None:
        if len(layer_weights) != len(losses):
            raise ValueError(
                f"{type(owner).__name__}: layer_weights has {len(layer_weights)} numbers for "
                f"{len(losses)} layers"
            )
        losses = [weight * loss for weight, loss in zip(layer_weights, losses, strict=True)]
    return torch.stack(list(losses)).sum()


def halving_weights(layers: int) -> list[float]:
    """Return 1 for the last layer, and for each one before it half of the next one's weight."""
    return [2.0 ** (number - layers) for number in range(1, layers + 1)]


def _comparable(student: Tensor, teacher: Tensor) -> Pair:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)
