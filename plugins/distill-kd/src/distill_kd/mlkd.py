"""MLKD, Jin et al. 2023: the teacher's classes, and the products of its samples and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from distill import once_differentiable
from distill.parameters import check, check_choice, check_factor
from distill_kd.batch_logits import (
    Gather,
    check_related,
    gathered,
    share_of_unlikely_classes,
    share_of_unsure_samples,
)
from distill_kd.logits import (
    LogitLoss,
    Rows,
    check_temperature,
    divergence,
    log_probabilities,
    standardized,
)

Masks = Literal["share", "none"]

MOST = 8192
"""Rows, or classes, whose products with each other make a matrix of 268 MB in float32."""


class MLKDLoss(LogitLoss):
    r"""Match classes, samples and classes to each other, at several temperatures.

    .. math::
        L = \sum_T \beta \, m_1 T^2 KL(p_t^T \| p_s^T)
            + \gamma \, m_1 \frac{1}{B} \| P_t P_t^\top - P_s P_s^\top \|^2
            + \delta \, m_2 \frac{1}{K} \| P_t^\top P_t - P_s^\top P_s \|^2,
        \qquad P = softmax(z / T) \in R^{B \times K}

    The divergence is a mean over samples. Norms are sums of squares: over B x B pairs of samples,
    divided by B; and over K x K pairs of classes, divided by K, whose products are sums over the
    batch. Nothing is averaged over the temperatures. So both of the latter terms grow with the
    batch, the third with its square.

    ``m_1`` and ``m_2`` are the parts of the samples, and of the classes, that the teacher finds no
    more likely than their median, about a half each. The authors' code makes masks of them, but
    multiplies numbers with them that are means already.

    Labels are not in it: the cross entropy is a term of its own beside this one, in the authors'
    code with weight 0.1 beside 0.9 for this.

    **What the authors' code does besides** is not in here: it has two views of each image, one
    strongly augmented. Cross entropy and divergence are taken of both and added up; the products
    are of the weakly augmented one. The divergence of the strong view goes without ``m_1``, and at
    two of its five temperatures it is that of the weak view once more. A file can augment a part of
    the images strongly (``RandomApply``), see the preset ``cifar100-mlkd``, not each of them in one
    way and in the other at once.

    **Depends on the batch of one process**, in its second and third term. ``gather: all`` takes the
    samples of all processes.

    Args:
        temperatures: the T, each > 0.
        beta: weight of the divergence, >= 0; ``T^2`` comes on top.
        gamma: weight of the products of samples, >= 0.
        delta: weight of the products of classes, >= 0.
        masks: ``"share"``, ``m_1`` and ``m_2`` as in the authors' code; ``"none"``, 1 for both.
        standardize: let the divergence alone see logits less their mean, in units of their standard
            deviation, as the authors of logit standardisation do (Sun et al., CVPR 2024,
            https://arxiv.org/abs/2403.01427), with temperatures 2, 3, 5, 2, 6 and weight 9.
        gather: ``"none"`` or ``"all"``, whose samples are compared.
        ignore_index: the label of positions that do not count, where targets are wired.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K). The teacher may exclude a class by ``-inf``. Of dense
          logits (B, K, H, W) and of texts (B, T, V) each position is a sample. Up to 8,192 samples,
          and as many classes, unless the weight of their term is 0.
        - targets: class indices, looked at only for positions to ignore; not needed.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; logits
            without classes or elements; too many samples or classes.

    Source: Jin, Wang, Lin, *Multi-Level Logit Distillation*, CVPR 2023; code
    https://github.com/Jin-Ying/Multi-Level-Logit-Distillation, whose temperatures are these.

    Example:
        >>> import torch
        >>> from distill_kd.mlkd import MLKDLoss
        >>> loss = MLKDLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher)
        >>> value.backward()
        >>> round(value.item(), 4)
        0.4559
    """

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        beta: float = 1.0,
        gamma: float = 1.0,
        delta: float = 1.0,
        masks: Masks = "share",
        standardize: bool = False,
        gather: Gather = "none",
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        is_list = isinstance(temperatures, (list, tuple)) and len(temperatures) > 0
        check(self, "temperatures", temperatures, is_list, "a list of one at least")
        for temperature in temperatures:
            check_temperature(self, temperature)
        for name, factor in (("beta", beta), ("gamma", gamma), ("delta", delta)):
            check_factor(self, name, factor)
        check_choice(self, "masks", masks, get_args(Masks))
        check_choice(self, "gather", gather, get_args(Gather))
        self.temperatures = tuple(temperatures)
        self.beta = beta
        self.gamma = gamma
        self.delta = delta
        self.masks = masks
        self.standardize = standardize
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
        self._check_sizes(*rows.student.shape)
        levels = torch.stack([self._levels(rows, temperature) for temperature in self.temperatures])
        instance, samples, classes = levels.sum(0)
        if self.masks == "share":
            unsure = share_of_unsure_samples(rows)
            instance, samples = instance * unsure, samples * unsure
            classes = classes * share_of_unlikely_classes(rows)
        total: Tensor = self.beta * instance + self.gamma * samples + self.delta * classes
        return total

    def _check_sizes(self, size: int, classes: int) -> None:
        if self.gamma:
            remedy = "gamma: 0 leaves that term out"
            check_related(self, "samples", size, MOST, remedy)
        if self.delta:
            remedy = "delta: 0 leaves that term out"
            check_related(self, "classes", classes, MOST, remedy)

    def _levels(self, rows: Rows, temperature: float) -> Tensor:
        """Return the three terms at one temperature, without weights and masks, (3)."""
        logs = [log_probabilities(side, temperature) for side in (rows.student, rows.teacher)]
        ours, theirs = (self._counted(log.exp(), rows) for log in logs)
        if self.standardize:
            sides = (standardized(side) for side in (rows.student, rows.teacher))
            logs = [log_probabilities(side, temperature) for side in sides]
        instance = rows.mean(divergence(*logs)) * temperature**2
        none = torch.zeros_like(instance)
        # Autocast would multiply in half precision.
        with torch.autocast(ours.device.type, enabled=False):
            samples = _product_distance(ours, theirs) / rows.count() if self.gamma else none
            classes = _product_distance(ours.T, theirs.T) / ours.shape[1] if self.delta else none
        return torch.stack([instance, samples, classes])

    def _counted(self, probabilities: Tensor, rows: Rows) -> Tensor:
        if rows.counted is None:
            return probabilities
        return probabilities.where(rows.counted[:, None], 0.0)


def _product_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of squared differences between the products of every two rows.

    The matrix of these is there once at a time: it is computed again for the backward.
    """
    found: Tensor = _ProductDistance.apply(first, second)
    return found


class _ProductDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return _products(first, second).square_().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        first, second = ctx.saved_tensors
        return _products(first, second) @ first * (4 * outer), None


def _products(first: Tensor, second: Tensor) -> Tensor:
    return torch.mm(second, second.T).neg_().addmm_(first, first.T)
