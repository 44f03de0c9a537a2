"""DIST, Huang et al. 2022: correlate with the teacher's probabilities instead of matching them."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from distill import gather as global_rows
from distill.parameters import check, check_choice, check_factor
from distill_kd.logits import LogitLoss, Rows, check_temperature, standardized

EpsForm = Literal["clamped", "added"]
Gather = Literal["none", "all"]


class DISTLoss(LogitLoss):
    r"""Pearson correlation of the probabilities, over the classes and over the samples.

    .. math::
        L = T^2 \left[ \beta \left(1 - \frac{1}{B} \sum_b \rho(S_{b\cdot}, P_{b\cdot})\right)
            + \gamma \left(1 - \frac{1}{K} \sum_k \rho(S_{\cdot k}, P_{\cdot k})\right) \right],
        \qquad S, P = softmax(logits / T)

    ``rho`` is the correlation: the cosine of two vectors less their means. The inter-class term
    takes that of a sample's K probabilities, and its mean over samples; the intra-class term that
    of a class's B probabilities, and its mean over classes. Labels are not in it: the cross entropy
    is a term of its own, of weight 1, beside this one of weight 2 in the authors' experiments.

    ``T^2`` multiplies both terms, as in all published codes; the paper's listing is without.

    **Depends on the batch of one process**: the intra-class term correlates over the samples that
    it has, 32 in the authors' runs on ImageNet. Published numbers are of this kind. ``gather: all``
    takes the samples of all processes.

    A vector without variation has no correlation. It counts as 0 and gives no gradient: equal
    logits of a sample; a class that is as likely for all samples, as those are whose probability is
    0; every class, in a batch of one, so that the intra-class term is then the constant
    ``gamma * T^2``. Variation within the rounding of the mean is none.

    Args:
        temperature: T > 0, dividing both sides' logits.
        beta: weight of the inter-class term, >= 0.
        gamma: weight of the intra-class term, >= 0.
        eps: keeps the correlation finite where probabilities hardly vary, > 0.
        eps_form: with centred vectors a and b, ``"clamped"`` divides by max(|a|, eps) max(|b|,
            eps), and ``"added"`` by |a| |b| + eps. The latter leaves out classes that no sample of
            the batch comes near, which are most of ImageNet's; where student and teacher are
            certain its minimum is not 0.
        gather: ``"none"`` or ``"all"``, whose samples are correlated.
        ignore_index: the label of positions that do not count, where targets are wired.
        standardize: whether to take logits less their mean, in units of their standard deviation.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K). The teacher may exclude a class by ``-inf``. Of dense
          logits (B, K, H, W) and of texts (B, T, V) each position is a sample.
        - targets: class indices, looked at only for positions to ignore; not needed.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, computed in float32, or in float64 if one of the logits is. Only the
          student gets a gradient.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; logits that
            have no classes or no elements.

    Equals, with ``tau`` as the temperature and the same beta and gamma:
        - the authors' DIST and mmrazor's ``DISTLoss``: ``eps_form="added"``.
        - torchdistill's ``DISTLoss``: ``eps_form="clamped"``.

    Source: Huang, You, Wang, Qian, Xu, *Knowledge Distillation from A Stronger Teacher*, NeurIPS
    2022, https://arxiv.org/abs/2205.10536; code https://github.com/hunto/DIST_KD.

    Example:
        >>> import torch
        >>> from distill_kd import DISTLoss
        >>> loss = DISTLoss()
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher)
        >>> value.backward()
        >>> round(value.item(), 4)
        0.75
    """

    def __init__(
        self,
        temperature: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-8,
        eps_form: EpsForm = "clamped",
        gather: Gather = "none",
        ignore_index: int = -100,
        standardize: bool = False,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check_temperature(self, temperature)
        check_factor(self, "beta", beta)
        check_factor(self, "gamma", gamma)
        check(self, "eps", eps, 0 < eps < math.inf, "a finite number > 0")
        check_choice(self, "eps_form", eps_form, get_args(EpsForm))
        check_choice(self, "gather", gather, get_args(Gather))
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.eps = eps
        self.eps_form = eps_form
        self.gather = gather
        self.standardize = standardize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        rows = self.rows(student, teacher, targets, mask).wide()
        counted = rows.counted
        ours, theirs = self._probabilities(rows.student), self._probabilities(rows.teacher)
        if self.gather == "all":
            ours, theirs = global_rows(ours), global_rows(theirs)
            counted = None if counted is None else global_rows(counted)
        rows = Rows(ours, theirs, counted=counted)
        inter = 1 - rows.mean(self._correlation(ours, theirs, 1))
        intra = 1 - self._correlation(*self._of_samples(rows), 0).mean()
        factor = self.temperature**2
        return torch.add(inter * (self.beta * factor), intra, alpha=self.gamma * factor)

    def _probabilities(self, logits: Tensor) -> Tensor:
        if self.standardize:
            logits = standardized(logits)
        return (logits / self.temperature).softmax(1)

    def _of_samples(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return both sides' probabilities, those of rows that do not count at their mean."""
        if rows.counted is None:
            return rows.student, rows.teacher
        kept = rows.counted[:, None]
        means = [
            side.where(kept, 0.0).sum(0) / rows.count() for side in (rows.student, rows.teacher)
        ]
        return rows.student.where(kept, means[0]), rows.teacher.where(kept, means[1])

    def _correlation(self, first: Tensor, second: Tensor, dim: int) -> Tensor:
        """Return the correlation of probabilities along a dimension, which goes away."""
        first, norm, varies = _centred(first, dim)
        second, other_norm, other_varies = _centred(second, dim)
        if self.eps_form == "clamped":
            divisor = norm.clamp(min=self.eps) * other_norm.clamp(min=self.eps)
        else:
            divisor = norm * other_norm + self.eps
        return (first * second).sum(dim) * (varies & other_varies) / divisor


def _centred(probabilities: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities less their mean, the norm of that, and whether it is above rounding."""
    mean = probabilities.mean(dim, keepdim=True)
    centred = probabilities - mean
    norm: Tensor = torch.linalg.vector_norm(centred, dim=dim)
    # A mean of equal numbers may be off by some roundings, whose directions mean nothing.
    rounding = 16 * torch.finfo(mean.dtype).eps * math.sqrt(probabilities.shape[dim])
    return centred, norm, norm > rounding * mean.squeeze(dim)
