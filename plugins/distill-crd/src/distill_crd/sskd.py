"""SSKD: the student learns the teacher's answers on rotated images, and how it compares them.

Of two stages (see ``self_supervision`` for the first) the second trains the student:

.. code-block:: yaml

    auxiliary:
      teacher_head: {reuse: teacher_head, frozen: true}
      student_head: {type: SSKDHead, inputs: {features: student.avgpool}}
    criterion:
      sskd:
        type: SSKDLoss
        inputs: {student_embeddings: student_head, teacher_embeddings: teacher_head}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from distill.parameters import Parametrized, check, check_choice, check_positive
from distill_crd.batch_scope import SCOPES, Scope, rows_in_scope
from distill_crd.divergence import softened_divergence, wide
from distill_crd.error_levels import answer_ranks, kept_rows
from distill_crd.self_supervision import own_originals, view_similarities
from distill_crd.view_rows import COPIES, check_views, split_views


class SSKDSimilarityLoss(Parametrized):
    r"""Divergence of the student's similarities of copies with originals from the teacher's.

    .. math::
        L = \frac{T^2}{|R|} \sum_{i \in R} KL(softmax(\cos(c_{t,i}, o_t) / T)
            \, \| \, softmax(\cos(c_{s,i}, o_s) / T))

    ``o`` are the embeddings of the originals and ``c`` those of their copies, of teacher and
    student. R are the copies that are kept: all whose own original the teacher finds most similar,
    and of the others int(ratio * their number), by the place at which it has the own original.

    The originals of a batch are the classes and its copies are ranked together, so the loss depends
    on the batch, and with ``gather: none`` on the samples of this process. A batch of a single
    image has a loss of 0, and says so in a warning. No label is needed.

    Args:
        temperature: T > 0. ``T^2`` is part of the loss.
        ratio: part of the wrong answers to keep, in [0, 1].
        gather: ``none`` compares the samples of this process, as published numbers do, ``all``
            those of the global batch.

    Shape:
        - student_embeddings: (4B, D_s), each original before its three copies.
        - teacher_embeddings: (4B, D_t); widths may differ.
        - returns: scalar, computed in float32 or wider. Only the student's side gets gradients.

    Raises:
        ValueError: a parameter out of range; embeddings that are no vectors, do not come in fours
            or are of different batches.

    Source: the third term of ``SSKDLoss``.
    """

    def __init__(self, temperature: float = 0.5, ratio: float = 0.75, gather: Scope = "none"):
        super().__init__()
        check_positive(self, "temperature", temperature)
        _check_ratio(self, "ratio", ratio)
        check_choice(self, "gather", gather, SCOPES)
        self.temperature = temperature
        self.ratio = ratio
        self.gather = gather

    def forward(self, student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        if len(student_embeddings) != len(teacher_embeddings):
            raise ValueError(
                f"{type(self).__name__}: embeddings must be of one batch, got student "
                f"{tuple(student_embeddings.shape)} and teacher {tuple(teacher_embeddings.shape)}"
            )
        student, teacher = wide(student_embeddings, teacher_embeddings)
        of_student, of_teacher = (
            view_similarities(self, f"{side}_embeddings", rows_in_scope(rows, self.gather))
            for side, rows in (("student", student), ("teacher", teacher))
        )
        kept = None
        if self.ratio < 1:
            kept = kept_rows(answer_ranks(of_teacher, own_originals(of_teacher)), self.ratio)
        return softened_divergence(of_student, of_teacher, self.temperature, kept)


class SSKDTransformedLoss(Parametrized):
    r"""Divergence of the student's softened classes of transformed copies from the teacher's.

    .. math::
        L = \frac{T^2}{|R|} \sum_{i \in R} KL(softmax(z_{t,i} / T) \, \| \, softmax(z_{s,i} / T))

    over copies, without the originals. R are the copies that are kept: all that the teacher puts
    into the class of their original, and of the others int(ratio * their number), by the place at
    which it has that class. With a ratio of 1, which is published, all are, and no label is needed.

    Args:
        temperature: T > 0. ``T^2`` is part of the loss.
        ratio: part of the wrong answers to keep, in [0, 1].
        gather: whether the copies of this process are ranked together (``none``) or those of the
            global batch (``all``); makes no difference with a ratio of 1.

    Shape:
        - student, teacher: logits (4B, K), each original before its three copies.
        - targets: class indices (B), one for each original; may be left out with a ratio of 1.
        - returns: scalar, computed in float32 or wider. Only the student gets gradients.

    Raises:
        ValueError: a parameter out of range; logits of different shapes, or that do not come in
            fours; targets that are missing, or no class indices.

    Source: the fourth term of ``SSKDLoss``.
    """

    def __init__(self, temperature: float = 4.0, ratio: float = 1.0, gather: Scope = "none"):
        super().__init__()
        check_positive(self, "temperature", temperature)
        _check_ratio(self, "ratio", ratio)
        check_choice(self, "gather", gather, SCOPES)
        self.temperature = temperature
        self.ratio = ratio
        self.gather = gather

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        _check_logits(self, student, teacher)
        labels = None
        if self.ratio < 1:
            labels = class_labels(self, student, targets, "ranks the teacher's answers by them")
        student, teacher = wide(student, teacher)
        _, copies = split_views(self, "student", student)
        _, answers = split_views(self, "teacher", teacher)
        return self.of_copies(copies, answers, labels)

    def of_copies(self, copies: Tensor, answers: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of the copies' logits (B, 3, K) and the teacher's answers to them."""
        if self.ratio == 1 or labels is None:
            return softened_divergence(copies, answers, self.temperature)
        copies, answers, labels = (
            rows_in_scope(rows, self.gather) for rows in (copies, answers, labels)
        )
        right = labels.repeat_interleave(COPIES)
        kept = kept_rows(answer_ranks(answers.flatten(0, 1), right), self.ratio)
        return softened_divergence(
            copies, answers, self.temperature, kept.unflatten(0, (-1, COPIES))
        )


class SSKDLoss(Parametrized):
    r"""Self-supervision knowledge distillation: cross entropy and three divergences.

    .. math::
        L = w_{ce} \, CE(z_s, y) + w_{kl} \, T_{kl}^2 \, KL(p_t \| p_s)
            + w_{ss} \, L_{ss} + w_{tf} \, L_{tf}

    The first two terms are of the originals, as in knowledge distillation; ``L_ss`` is
    ``SSKDSimilarityLoss`` and ``L_tf`` ``SSKDTransformedLoss``, each with its ``T^2``. A file that
    is to log each of the four has them as terms of their own, with ``SplitViews`` for the first
    two.

    The third term depends on the batch: see there what ``gather`` does to it, and what becomes of a
    batch of a single image.

    Args:
        kl_temp: temperature for the originals, > 0.
        ss_temp: temperature of the similarities, > 0.
        tf_temp: temperature for the copies, > 0.
        ss_ratio: part of the teacher's wrong similarities to keep, in [0, 1].
        tf_ratio: part of the teacher's wrong classes of copies to keep, in [0, 1].
        loss_weights: of cross entropy, originals, similarities and copies (ce, kl, ss, tf), >= 0.
            The default is published for ImageNet; on CIFAR-100 the first one is 0.1.
        gather: ``none`` compares and ranks the samples of this process, as published numbers do,
            ``all`` those of the global batch.

    Shape:
        - student, teacher: logits (4B, K), each original before its three copies.
        - student_embeddings, teacher_embeddings: (4B, D_s) and (4B, D_t), of an ``SSKDHead`` each.
        - targets: class indices (B), one for each original.
        - returns: scalar, computed in float32 or wider. Only the student's side gets gradients.

    Raises:
        ValueError: a parameter out of range; logits or embeddings of different batches, or that do
            not come in fours; targets that are missing, or no class indices.

    Equals torchdistill's ``SSKDLoss``, which has the same names but weighs all terms with 1 by
    default. Of wrong answers of equal rank the first are kept here, which ones there its sort
    leaves open; and where no row of a term is kept, that gives NaN and this one 0.

    Source: Xu, Liu, Li, Loy, *Knowledge Distillation Meets Self-Supervision*, ECCV 2020,
    https://arxiv.org/abs/2006.07114; ResNet-34 to ResNet-18 on ImageNet 71.62, torchdistill 70.09.
    """

    def __init__(
        self,
        kl_temp: float = 4.0,
        ss_temp: float = 0.5,
        tf_temp: float = 4.0,
        ss_ratio: float = 0.75,
        tf_ratio: float = 1.0,
        loss_weights: Sequence[float] = (1.0, 0.9, 10.0, 2.7),
        gather: Scope = "none",
    ) -> None:
        super().__init__()
        for name, value in (("kl_temp", kl_temp), ("ss_temp", ss_temp), ("tf_temp", tf_temp)):
            check_positive(self, name, value)
        _check_ratio(self, "ss_ratio", ss_ratio)
        _check_ratio(self, "tf_ratio", tf_ratio)
        fits = len(loss_weights) == 4 and all(0 <= weight < math.inf for weight in loss_weights)
        allowed = "four finite numbers >= 0, of the terms ce, kl, ss and tf"
        check(self, "loss_weights", loss_weights, fits, allowed)
        check_choice(self, "gather", gather, SCOPES)
        self.kl_temp = kl_temp
        self.ss_temp = ss_temp
        self.tf_temp = tf_temp
        self.ss_ratio = ss_ratio
        self.tf_ratio = tf_ratio
        self.loss_weights = tuple(loss_weights)
        self.gather = gather
        self.similarity = SSKDSimilarityLoss(ss_temp, ss_ratio, gather)
        self.transformed = SSKDTransformedLoss(tf_temp, tf_ratio, gather)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_embeddings: Tensor,
        teacher_embeddings: Tensor,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        _check_logits(self, student, teacher)
        student, teacher = wide(student, teacher)
        labels = class_labels(self, student, targets, "has cross entropy with them")
        originals, copies = split_views(self, "student", student)
        of_originals, of_copies = split_views(self, "teacher", teacher)
        ce, kl, ss, tf = self.loss_weights
        similarity: Tensor = self.similarity(student_embeddings, teacher_embeddings)
        return (
            ce * F.cross_entropy(originals, labels)
            + kl * softened_divergence(originals, of_originals, self.kl_temp)
            + ss * similarity
            + tf * self.transformed.of_copies(copies, of_copies, labels)
        )


def class_labels(owner: object, logits: Tensor, targets: Tensor | None, why: str) -> Tensor:
    """Return the class of each original, int64 (B).

    Raises:
        ValueError: if there are none, or they are no class indices of a quarter of the logits.
    """
    kind = type(owner).__name__
    if targets is None:
        raise ValueError(
            f"{kind} needs a class label of each image, since it {why}, and the data set gives "
            "none; without labels, use SSKDSimilarityLoss and SSKDTransformedLoss with ratio 1"
        )
    if targets.ndim != 1 or targets.is_floating_point():
        raise ValueError(
            f"{kind}: targets must be class indices (B), got {tuple(targets.shape)} of "
            f"{targets.dtype}; images that are mixed have no single class"
        )
    check_views(owner, "logits", logits, len(targets))
    return targets.long()


def _check_ratio(owner: object, name: str, ratio: float) -> None:
    check(owner, name, ratio, 0 <= ratio <= 1, "a number from 0 to 1")


def _check_logits(owner: object, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"{type(owner).__name__}: student and teacher must be logits (4B, K) of one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
