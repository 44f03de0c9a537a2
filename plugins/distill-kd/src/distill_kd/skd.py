"""SKD, Jeong et al. 2026: the teacher's classes, and how its logits lie to each other."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from distill.parameters import check_choice, check_factor, check_positive
from distill_kd.batch_logits import (
    Gather,
    check_related,
    gathered,
    share_of_unlikely_classes,
    share_of_unsure_samples,
    unsure_samples,
)
from distill_kd.logits import (
    LogitLoss,
    Rows,
    check_temperature,
    cross_entropy_of,
    divergence,
    log_probabilities,
)

Masks = Literal["share", "samples", "none"]

MOST_ROWS = 4096
"""Their covariance is a matrix of so many rows, which is decomposed for each batch."""


class SKDLoss(LogitLoss):
    r"""Cross entropy, divergence from the teacher, and the directions of logits in a batch.

    .. math::
        L = \alpha \, CE + \beta \, m_1 T^2 KL(p_t^T \| p_s^T)
            + \gamma \, m_2 \frac{1}{B} \sum_i \sqrt{D_i (C + tikhonov \cdot I)^{-1} D_i^\top},
        \qquad D = (G_s - G_t) / K

    G holds the cosines of the logits of every two samples, (B, B). C is the covariance of the
    columns of D, of which each row is an observation (divisor B - 1): differences count less where
    they vary more.

    The authors' code makes a mask of the samples that the teacher is less sure of, and one of the
    classes that it finds less likely, but multiplies numbers with them that are means already: what
    is left is a factor of about a half, ``m_1`` and ``m_2``, the parts of the samples and of the
    classes that are at most their median. The paper has neither these, nor ``T^2``, nor ``1 / K``.

    **Depends on the batch of one process**: directions are compared with those of the samples that
    it has. ``gather: all`` takes the samples of all processes. Its cost grows with the third power
    of the batch.

    Logits of length 0 have no direction: they count as orthogonal to all, and get no gradient.
    Where student and teacher agree, and in a batch of one, the third term is 0 without a gradient.

    Args:
        temperature: T > 0, dividing both sides' logits in the divergence.
        alpha: weight of the cross entropy, >= 0, whose mean is over the labels; without targets it
            is left out.
        beta: weight of the divergence, >= 0, mean over samples; ``T^2`` comes on top.
        gamma: weight of the directions, >= 0, mean over samples.
        tikhonov: added to the diagonal of the covariance, > 0. It counts: with ``1 / K``
            differences are small beside 0.1.
        scale_by_classes: whether D is divided by K, as in the authors' code.
        masks: ``"share"``, ``m_1`` and ``m_2`` as the authors' code has them; ``"samples"``, each
            sample by itself in the divergence, which is then the sum over the samples that the
            teacher is less sure of, divided by all, as torchdistill ports it, with the authors'
            ``m_2``; ``"none"``, 1 for both.
        gather: ``"none"`` or ``"all"``, whose samples are compared.
        ignore_index: the label of positions that do not count.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K), finite. Of dense logits (B, K, H, W) and of texts (B, T,
          V) each position is a sample, up to 4,096 in all.
        - targets: class indices (B), or class probabilities (B, K); or ``None``.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; logits
            without classes or elements; more than 4,096 samples.

    Equals, with these parameters:
        - the authors' code: ``temperature=4, alpha=0.5, beta=0.5, gamma=0.5, tikhonov=0.1``.
        - the paper: ``masks="none", scale_by_classes=False, beta=1 / temperature**2, gamma=1``.
        - torchdistill's ``SKDInstanceLoss`` and ``SKDDirectionLoss`` of ``mode="paper"``: each of
          the paper's terms alone; of ``mode="code"``: ``masks="samples"``.

    Source: Jeong, Lee, Choi, *Streamlined Knowledge Distillation*, CVPR 2026; code
    https://github.com/HyunJunSik/StreamLined.

    Example:
        >>> import torch
        >>> from distill_kd.skd import SKDLoss
        >>> loss = SKDLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher, torch.tensor([0, 1]))
        >>> value.backward()
        >>> round(value.item(), 4)
        0.4943
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 0.5,
        tikhonov: float = 0.1,
        scale_by_classes: bool = True,
        masks: Masks = "share",
        gather: Gather = "none",
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_temperature(self, temperature)
        for name, factor in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            check_factor(self, name, factor)
        check_positive(self, "tikhonov", tikhonov)
        check_choice(self, "masks", masks, get_args(Masks))
        check_choice(self, "gather", gather, get_args(Gather))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.tikhonov = tikhonov
        self.scale_by_classes = scale_by_classes
        self.masks = masks
        self.gather = gather

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        rows = self.rows(student, teacher, targets, mask)
        if self.gather == "all":
            rows = gathered(rows)
        rows = rows.wide()
        remedy = "pool the positions, or take a smaller batch"
        check_related(self, "samples", len(rows.student), MOST_ROWS, remedy)
        loss = self._instance(rows) * (self.beta * self.temperature**2)
        if self.gamma:
            loss = loss + self._direction(rows) * self.gamma
        if self.alpha and (rows.labels is not None or rows.soft is not None):
            hard = cross_entropy_of(rows.student.log_softmax(1), rows)
            loss = loss + rows.mean(hard) * self.alpha
        return loss

    def _instance(self, rows: Rows) -> Tensor:
        """Return the mean divergence, masked, without T^2."""
        found = divergence(
            log_probabilities(rows.student, self.temperature),
            log_probabilities(rows.teacher, self.temperature),
        )
        if self.masks == "samples":
            return rows.mean(found * unsure_samples(rows))
        whole = rows.mean(found)
        return whole if self.masks == "none" else whole * share_of_unsure_samples(rows)

    def _direction(self, rows: Rows) -> Tensor:
        """Return the mean length of the rows of D, in units of their deviation, masked."""
        # Autocast would multiply in half precision.
        with torch.autocast(rows.student.device.type, enabled=False):
            difference = _cosines(rows.student) - _cosines(rows.teacher)
            if self.scale_by_classes:
                difference = difference / rows.student.shape[1]
            # Unchecked, since the host would wait for it: what is not finite is told by the loss.
            factor: Tensor = torch.linalg.cholesky_ex(self._covariance(difference, rows)).L
            whitened = torch.linalg.solve_triangular(factor, difference, upper=False)
        # The rows of D are its columns, since it is symmetric.
        found = rows.mean(torch.linalg.vector_norm(whitened, dim=0))
        return found if self.masks == "none" else found * share_of_unlikely_classes(rows)

    def _covariance(self, difference: Tensor, rows: Rows) -> Tensor:
        """Return the covariance of columns over the rows that count, with its diagonal raised."""
        count = rows.count()
        centred = difference - difference.sum(0) / count
        if rows.counted is not None:
            centred = centred.where(rows.counted[:, None], 0.0)
        divisor = max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp_min(1)
        raised = torch.eye(len(difference), dtype=difference.dtype, device=difference.device)
        return centred.T @ centred / divisor + self.tikhonov * raised


def _cosines(logits: Tensor) -> Tensor:
    """Return the cosines of every two rows of logits (N, K), (N, N); 0 for rows of length 0."""
    length: Tensor = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
    # Divided by a tiny number instead, rows of zeros would get a huge gradient.
    directions = (logits / length.where(length > 0, 1.0)).where(length > 0, 0.0)
    return directions @ directions.T
