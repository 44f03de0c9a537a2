"""Several teachers at once: averaged, or weighted for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.parameters import check_choice
from distill_kd.kd import KDLoss, Reduction
from distill_kd.logits import (
    LogitLoss,
    Rows,
    check_same_shape,
    cross_entropy_of,
    log_probabilities,
)

Weighting = Literal["mean", "confidence", "entropy"]
Average = Literal["probabilities", "logits"]


class MultiTeacherKDLoss(LogitLoss):
    r"""KDLoss from several teachers, which are put together to one for each sample.

    .. math::
        L = \alpha \, CE(student, targets) + \beta \, T^2 \, KL(\bar p^T \| p_s^T),
        \qquad \bar p^T = \sum_k w_k \, softmax(z_k / T), \qquad \sum_k w_k = 1

    With one teacher it is ``KDLoss``. What is said there of ``T^2``, ``alpha`` and missing targets
    holds here too.

    The weights :math:`w_k` of a sample, from the teachers' probabilities at temperature 1, with M
    teachers:

    ============== ===============================================================================
    weighting      :math:`w_k`
    ============== ===============================================================================
    ``mean``       :math:`1 / M`
    ``confidence`` :math:`\frac{1}{M - 1} (1 - \frac{e^{c_k}}{\sum_j e^{c_j}})`, where :math:`c_k`
                   is the cross entropy of teacher k with the label: who is wrong, and sure of it,
                   counts little. It needs targets, whatever ``alpha`` is (CA-MKD).
    ``entropy``    :math:`\frac{1}{M - 1} (1 - \frac{h_k}{\sum_j h_j})`, where :math:`h_k` is the
                   entropy of teacher k: who is unsure counts little. It needs no targets (EBKD).
    ============== ===============================================================================

    No weight is above :math:`1 / (M - 1)`, so of two teachers one may be left out, of three none
    may have all.

    Args:
        temperature: T > 0, dividing all logits in the soft term.
        alpha: weight of the cross entropy, >= 0.
        beta: weight of the soft term, >= 0; ``None`` means ``1 - alpha``.
        weighting: ``"mean"``, ``"confidence"`` or ``"entropy"``, as above.
        average: what is averaged. ``"probabilities"``: the softened classes, as above, where a
            class counts that any teacher believes in; it has the gradient of the weighted sum of
            the teachers' KDLoss, and is smaller by how much they disagree. ``"logits"``: the
            logits, hence geometric means of probabilities, where a class counts that all believe
            in; a teacher with larger logits then has more to say.
        reduction: what is averaged over what, as in ``KDLoss``.
        label_smoothing: in [0, 1], for the cross entropy of the student only.
        ignore_index: the label of positions that the cross entropy skips.
        ignore_soft: whether the soft term skips them too.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student: logits (B, K), (B, K, H, W) and more, or (B, T, V).
        - teachers: a list of at least one tensor of the student's shape, in a file
          ``inputs: {teachers: [first, second]}``.
        - targets: class indices or class probabilities, as in ``KDLoss``; or ``None``.
        - mask: positions that count, of the logits' shape without classes; or ``None``.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    Raises:
        ValueError: a parameter out of range; no teacher, or a tensor in place of the list;
            a teacher of another shape than the student; ``confidence`` without targets.

    Source: Zhang, Chen, Wang, *Confidence-Aware Multi-Teacher Knowledge Distillation*, ICASSP 2022,
    https://arxiv.org/abs/2201.00007, of which this is the loss on logits (L_KD); its loss on
    features is another term. The authors' code (https://github.com/Rorozhl/CA-MKD) adds up weighted
    divergences in place of the one from the weighted mean, which has the same gradient, and divides
    by the number of teachers once more: its ``-a`` is M times ``beta``. Its EBKD is the weighting
    by entropy that it compares with, after Kwon et al., *Adaptive Knowledge Distillation Based on
    Entropy*, ICASSP 2020, and has no division by M - 1: its ``-a`` is M / (M - 1) times ``beta``.
    The mean of several teachers is from You et al., *Learning from Multiple Teacher Networks*, KDD
    2017.

    Example:
        >>> import torch
        >>> from distill_kd.multi_teacher import MultiTeacherKDLoss
        >>> loss = MultiTeacherKDLoss(temperature=4.0, alpha=0.1, weighting="confidence")
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> right = torch.tensor([[3.0, 1.0, -1.0], [1.0, 3.0, 0.0]])
        >>> wrong = torch.tensor([[0.0, 3.0, -1.0], [4.0, 0.0, 0.0]])
        >>> value = loss(student, [right, wrong], torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.1778
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        beta: float | None = None,
        weighting: Weighting = "mean",
        average: Average = "probabilities",
        reduction: Reduction = "batchmean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        ignore_soft: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_choice(self, "weighting", weighting, get_args(Weighting))
        check_choice(self, "average", average, get_args(Average))
        self._kd = KDLoss(
            temperature,
            alpha,
            beta,
            reduction,
            label_smoothing,
            ignore_index,
            ignore_soft=ignore_soft,
            class_dim=class_dim,
        )
        self.temperature = temperature
        self.alpha = alpha
        self.beta = self._kd.beta
        self.weighting = weighting
        self.average = average
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_soft = ignore_soft

    def forward(
        self,
        student: Tensor,
        teachers: Sequence[Tensor],
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        self._check(student, teachers, targets)
        teacher = teachers[0]
        if len(teachers) > 1:
            with torch.no_grad():
                teacher = self._together(student, teachers, targets)
        loss: Tensor = self._kd(student, teacher, targets, mask)
        return loss

    def _check(self, student: Tensor, teachers: Sequence[Tensor], targets: Tensor | None) -> None:
        name = type(self).__name__
        if not isinstance(teachers, (list, tuple)) or not teachers:
            got = "none" if isinstance(teachers, (list, tuple)) else "one tensor"
            raise ValueError(
                f"{name}: teachers must be a list of logits, as inputs: {{teachers: [first, "
                f"second]}}, got {got}"
            )
        for teacher in teachers:
            check_same_shape(self, student, teacher)
        if self.weighting == "confidence" and targets is None:
            raise ValueError(
                f"{name}: weighting confidence needs targets; entropy and mean do without"
            )

    def _together(
        self, student: Tensor, teachers: Sequence[Tensor], targets: Tensor | None
    ) -> Tensor:
        """Return logits of the student's shape whose softened classes are those of all teachers."""
        dtype = torch.float32
        for teacher in teachers:
            dtype = torch.promote_types(dtype, teacher.dtype)
        labels = targets if self.weighting == "confidence" else None
        labelled = [self.rows(teacher, teacher, labels) for teacher in teachers]
        # Positions whose label is to be ignored have a soft term all the same.
        rows = [replace(one, counted=None).wide() for one in labelled]
        softened = [log_probabilities(one.teacher.to(dtype), self.temperature) for one in rows]
        weights = self._weights(rows, dtype)
        if (kept := labelled[0].counted) is not None:
            weights = weights.where(kept, 1 / len(rows))
        mean = torch.zeros_like(softened[0])
        for weight, one in zip(weights, softened, strict=True):
            mean += weight[:, None] * (one if self.average == "logits" else one.exp())
        found = self.temperature * (mean if self.average == "logits" else mean.log())
        dim = self._classes_in(student)
        positions = student.movedim(dim, -1).shape[:-1]
        return found.reshape(*positions, -1).movedim(-1, dim)

    def _weights(self, rows: Sequence[Rows], dtype: torch.dtype) -> Tensor:
        """Return the weights of the teachers for each row, (M, N)."""
        if self.weighting == "mean":
            shape = (len(rows), len(rows[0].teacher))
            return torch.full(shape, 1 / len(rows), dtype=dtype, device=rows[0].teacher.device)
        logs = [log_probabilities(one.teacher.to(dtype)) for one in rows]
        if self.weighting == "confidence":
            pairs = zip(logs, rows, strict=True)
            wrong = torch.stack([cross_entropy_of(log, one) for log, one in pairs]).softmax(0)
        else:
            entropies = torch.stack([-(log.exp() * log).sum(1) for log in logs])
            total = entropies.sum(0)
            # Of teachers that are all certain none is less so than another.
            wrong = torch.where(total > 0, entropies / total, 1 / len(rows))
        return (1 - wrong) / (len(rows) - 1)
