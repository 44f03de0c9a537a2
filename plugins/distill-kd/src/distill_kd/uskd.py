"""USKD, Yang et al. 2023: no teacher, but soft labels made of the student's own outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill import gather as global_rows
from distill.parameters import Parametrized, check, check_choice, check_factor
from distill_kd.logits import (
    RowLoss,
    Rows,
    class_rows,
    cross_entropy_of,
    log_probabilities,
)
from distill_kd.target_and_rest import check_has_rest, rest_log_probabilities

Rank = Literal["paper", "code"]
Gather = Literal["none", "all"]

WEAK_SMOOTHING = 0.1
"""What the label of the weak logits gives away to all classes."""
SMALLEST_REST = 1e-6
"""Added to what the labels leave to the other classes, which is divided by."""


class USKDHead(Parametrized):
    """The weak logits of USKD: a mean over positions, and a linear layer.

    Args:
        in_features: channels of the features; ``None`` finds them in ``setup``.
        num_classes: number of logits; ``None`` takes that of ``like``.

    Shape:
        - features: of a middle layer of the student, in a ResNet the last stage but one: maps
          (B, C, H, W), tokens (B, N, C), or vectors (B, C).
        - like: the student's logits, of which only the shape is used.
        - returns: weak logits (B, num_classes).

    Raises:
        ValueError: a number below 1; features of another form, or of other channels than the layer
            has; ``like`` missing though ``num_classes`` is not given.
        RuntimeError: ``forward`` before the shapes are known.

    Source: the weak supervision of USKD, see ``USKDLoss``, whose gradient flows through the head to
    the student.
    """

    def __init__(self, in_features: int | None = None, num_classes: int | None = None) -> None:
        super().__init__()
        for name, number in (("in_features", in_features), ("num_classes", num_classes)):
            check(self, name, number, number is None or number >= 1, "a whole number >= 1")
        self.in_features = in_features
        self.num_classes = num_classes
        self.linear: nn.Linear | None = None
        if in_features is not None and num_classes is not None:
            self.linear = nn.Linear(in_features, num_classes)

    def setup(self, features: Tensor, like: Tensor | None = None) -> None:
        """Build the layer for these features, or check that the one there is fits them."""
        width = self._vectors(features).shape[1]
        if self.linear is None:
            self.in_features = width if self.in_features is None else self.in_features
            if self.num_classes is None and like is None:
                raise ValueError(
                    "USKDHead: give num_classes, or wire the student's logits to `like`, whose "
                    "shape says how many"
                )
            if self.num_classes is None:
                assert like is not None
                self.num_classes = like.shape[1]
            self.linear = nn.Linear(self.in_features, self.num_classes)
        self._check_width(width, features)
        self.linear.to(features.device, torch.promote_types(features.dtype, torch.float32))

    def forward(self, features: Tensor, like: Tensor | None = None) -> Tensor:
        """Return the weak logits of a batch; see the class for shapes."""
        if self.linear is None:
            raise RuntimeError(
                "USKDHead has no layer yet: call setup with features, or give in_features and "
                "num_classes"
            )
        vectors = self._vectors(features)
        self._check_width(vectors.shape[1], features)
        logits: Tensor = self.linear(vectors.to(self.linear.weight.dtype))
        return logits

    def _vectors(self, features: Tensor) -> Tensor:
        positions = {2: (), 3: (1,), 4: (2, 3)}.get(features.ndim)
        if positions is None:
            raise ValueError(
                "USKDHead: features must be maps (B, C, H, W), tokens (B, N, C) or vectors (B, C), "
                f"got {tuple(features.shape)}"
            )
        return features.mean(positions) if positions else features

    def _check_width(self, width: int, features: Tensor) -> None:
        if width != self.in_features:
            raise ValueError(
                f"USKDHead: in_features is {self.in_features}, but features of shape "
                f"{tuple(features.shape)} have {width}"
            )


class USKDLoss(RowLoss):
    r"""Cross entropies with soft labels that the student's outputs, strong and weak, are made into.

    .. math::
        L = -\frac{1}{B} \sum_b \left[ \alpha \, P_y \log s_y
            + \beta \sum_{k \ne y} n_k \log q_k + \mu \sum_k \hat y_k \log w_k \right], \qquad
        P_y = s_y^2 + v - \overline{s_y^2}

    ``s`` and ``w`` are the probabilities of the student's logits and of its weak ones, ``q`` the
    softmax of the student's logits over all classes but the label y.

    - The label's soft label P is the square of the student's own probability, about the label's
      value v, which is 1; the bar is the mean over the batch.
    - The others' soft label n follows Zipf's law: the class of rank r has 1 / r, all that are not
      the label then share 1. Ranks are those of ``w_k / (1 - w_y) + s_k / (1 - s_y)``, the highest
      first; of equals the one with the lower index.
    - The weak logits learn the label themselves, ``0.9 onehot + 0.1 / K``, by a head of the middle
      of the student (``USKDHead``).

    P, n and ranks are constants: no gradient flows through them. The cross entropy with the labels
    is a term of its own, of weight 1.

    **Depends on the batch of one process**: the mean in P is over the samples that it has, and so
    it was for published numbers. ``gather: all`` takes the samples of all processes.

    Args:
        alpha: weight of the label's part, >= 0; 1 on ImageNet, 0.1 on CIFAR-100.
        beta: weight of the others' part, >= 0; 0.1 on both.
        mu: weight of the weak logits' part, >= 0; 0.005 on ImageNet, 0.1 on CIFAR-100.
        rank: ``"code"`` ranks by what the authors' code does, with which their numbers were made:
            there s is the *logarithm* of the probabilities in the second half of the score,
            ``log s_k / (1 - log s_y)``. ``"paper"`` is as above.
        gather: ``"none"`` or ``"all"``, whose samples the mean in P is over.
        ignore_index: the label of positions that do not count.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, weak: logits (B, K), K > 1; both get a gradient. A class may be excluded by a low
          number such as ``-1e4``. Of dense logits (B, K, H, W) and of texts (B, T, V) each position
          is a sample.
        - targets: class indices of any integer type, (B), (B, H, W) or (B, T); or class
          probabilities of the logits' shape (MixUp, CutMix), see below.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, the mean over positions that count, computed in float32, or in float64 if
          one of the logits is.

    Class probabilities have two labels: the two likeliest classes, if the second is likelier than a
    third (so smoothed labels of one class have one). Each has a P of its own, with its probability
    for v and a mean over the samples that have as many labels; the others are all but both. The
    weak logits learn all of them.

    Raises:
        ValueError: a parameter out of range; logits of different shapes; one class; targets that
            fit neither of the shapes.

    Equals the authors' ``USKDLoss`` in cls_KD, less its linear layer.

    Source: Yang, Zeng, Li, Zhang, Yuan, Li, *From Knowledge Distillation to Self-Knowledge
    Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels*, ICCV 2023,
    https://arxiv.org/abs/2303.13005; code https://github.com/yzd-v/cls_KD.

    Example:
        >>> import torch
        >>> from distill_kd.uskd import USKDLoss
        >>> loss = USKDLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> weak = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]], requires_grad=True)
        >>> value = loss(student, weak, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.39
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        rank: Rank = "code",
        gather: Gather = "none",
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        for name, factor in (("alpha", alpha), ("beta", beta), ("mu", mu)):
            check_factor(self, name, factor)
        check_choice(self, "rank", rank, get_args(Rank))
        check_choice(self, "gather", gather, get_args(Gather))
        self.alpha = alpha
        self.beta = beta
        self.mu = mu
        self.rank = rank
        self.gather = gather

    def forward(
        self, student: Tensor, weak: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        if weak.shape != student.shape:
            raise ValueError(
                f"USKDLoss: student and weak logits must have the same shape, got student "
                f"{tuple(student.shape)} and weak {tuple(weak.shape)}"
            )
        rows = self.rows(student, student, targets, mask).labelled(self)
        # The rows' teacher is the weak logits here, which learn.
        rows = replace(rows, teacher=class_rows(weak, self._classes_in(weak)))
        losses = self.losses_of(rows)
        log_labels, others = losses[:, :-1], losses[:, -1]
        soft = self._soft_labels(log_labels.detach(), _labels(rows, losses.dtype)[1], rows.counted)
        return rows.mean(torch.sub(others, (soft * log_labels).sum(1), alpha=self.alpha))

    def row_losses(self, rows: Rows) -> Tensor:
        """Return log s of each label, and the other two parts in one, weighted, (N, L + 1)."""
        check_has_rest(self, rows.student)
        log_student, log_weak = log_probabilities(rows.student), log_probabilities(rows.teacher)
        labels, values = _labels(rows, log_student.dtype)
        zipf = self._zipf(log_student.detach(), log_weak.detach(), labels, values > 0)
        rest = -(zipf * rest_log_probabilities(rows.student, labels)).sum(1)
        weak = cross_entropy_of(log_weak, rows, WEAK_SMOOTHING)
        others = self.beta * rest + self.mu * weak
        return torch.cat([log_student.gather(1, labels), others[:, None]], 1)

    def _soft_labels(self, log_labels: Tensor, values: Tensor, counted: Tensor | None) -> Tensor:
        """Return P of each label, 0 where there is none, (N, L)."""
        square = log_labels.exp().square()
        found = values > 0 if counted is None else (values > 0) & counted[:, None]
        everyone, of = square, found
        if self.gather == "all":
            everyone, of = global_rows(square), global_rows(found)
        mean = everyone.where(of, 0.0).sum(0) / of.sum(0).clamp_min(1)
        return (square + values - mean).where(found, 0.0)

    def _zipf(self, log_student: Tensor, log_weak: Tensor, labels: Tensor, has: Tensor) -> Tensor:
        """Return the soft label of the classes that are not labels, (N, K)."""
        strong = log_student if self.rank == "code" else log_student.exp()
        score = _share(log_weak.exp(), labels, has) + _share(strong, labels, has)
        order = score.argsort(dim=1, descending=True, stable=True)
        classes = score.shape[1]
        law = torch.arange(1, classes + 1, device=score.device, dtype=score.dtype).reciprocal()
        zipf = torch.empty_like(score).scatter_(1, order, law.expand_as(score))
        zipf.scatter_(1, labels, 0.0)
        return zipf / zipf.sum(1, keepdim=True).clamp_min(torch.finfo(zipf.dtype).tiny)


def _labels(rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return labels and their values, (N, 1) or (N, 2); a second that is none repeats the first."""
    if rows.soft is None:
        assert rows.labels is not None, "a loss with targets"
        return rows.labels[:, None], torch.ones_like(rows.labels[:, None], dtype=dtype)
    values, labels = rows.probabilities(dtype).topk(min(3, rows.soft.shape[1]), dim=1)
    third = values[:, 2] if values.shape[1] > 2 else torch.zeros_like(values[:, 1])
    is_label = values[:, 1] > third
    second = labels[:, 1].where(is_label, labels[:, 0]), values[:, 1].where(is_label, 0.0)
    return torch.stack([labels[:, 0], second[0]], 1), torch.stack([values[:, 0], second[1]], 1)


def _share(scores: Tensor, labels: Tensor, has: Tensor) -> Tensor:
    """Return scores (N, K) in parts of what the labels leave."""
    of_labels = (scores.gather(1, labels) * has).sum(1, keepdim=True)
    return scores / (1 - of_labels + SMALLEST_REST)
