"""CTKD, Li et al. 2023: a temperature that learns to make it harder for the student."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.parameters import check, check_choice, check_positive
from distill_kd.logits import RowLoss, Rows, divergence, log_probabilities, standardized

Form = Literal["global", "instance"]


class CTKDLoss(RowLoss):
    r"""The teacher's softened classes, at a temperature that is trained against the student.

    .. math::
        L = \frac{1}{B} \sum_b T_b^2 KL(p_t^{T_b} \| p_s^{T_b}),
        \qquad T = t_{start} + t_{range} \, \sigma(\theta)

    The student follows the gradient of L; :math:`\theta` gets it times :math:`-\lambda`, so that
    the temperature moves to where teacher and student differ most. :math:`\lambda` grows from 0 to
    1 like half a wave of a cosine: :math:`\lambda = (1 - \cos(\pi n / ramp\_steps)) / 2` at the
    n-th step, counted from 1, and 1 after the last of these.

    Labels are not in it: the cross entropy is a term of its own, of weight 0.1 beside 0.9 for this
    one in the authors' experiments on CIFAR-100, 1 beside 1 on ImageNet.

    **It has parameters.** They are optimised with the student's, at its learning rate and weight
    decay; decay pulls :math:`\theta` to 0. A group of the optimizer sets them apart:
    ``{match: [criterion.<term>], params: {weight_decay: 0.0}}``.

    **Steps are counted here**, one for each call in train mode: with ``accumulate`` one for each of
    a step's batches. The authors raise :math:`\lambda` once an epoch, to the value that it has here
    at the epoch's end. The count is in checkpoints, and alike on all processes; a stage that takes
    over the criterion of another goes on with it.

    Args:
        ramp_steps: steps until the reversal has its full strength, >= 1: 10 epochs on CIFAR-100, 5
            on ImageNet.
        form: ``"global"``, one :math:`\theta` for all; or ``"instance"``, one for each sample, that
            two linear layers find in both sides' logits. Those get no gradient through it. They
            start with the same temperature for all.
        t_start: the lowest temperature, > 0.
        t_range: how far it may rise above that, > 0; the authors' ``t_end``.
        initial: where :math:`\theta` starts: 1 means ``T = 15.6``, as in the authors' code.
        hidden: width between both layers of ``"instance"``.
        standardize: match logits less their mean, in units of their standard deviation; the authors
            of that (Sun et al., CVPR 2024, https://arxiv.org/abs/2403.01427) give it weight 9.
        ignore_index: the label of positions that do not count, where targets are wired.
        class_dim: the dimension of the classes; ``None`` for the last of three, else 1.

    Shape:
        - student, teacher: logits (B, K), (B, K, H, W) with classes in dimension 1, or (B, T, V),
          whose positions are samples then. For ``form="global"`` the teacher may exclude a class by
          ``-inf``.
        - targets: class indices, looked at only for positions to ignore; not needed.
        - mask: of the shape of class indices; where it is 0 nothing counts.
        - returns: scalar, the mean over positions that count, computed in float32, or in float64 if
          one of the logits is.

    Raises:
        ValueError: a parameter out of range; student and teacher of different shapes; logits
            without classes or elements.
        RuntimeError: ``form="instance"`` called before ``setup`` has built its layers.

    Source: Li, Li, Yang, Zhao, Song, Luo, Li, Yang, *Curriculum Temperature for Knowledge
    Distillation*, AAAI 2023, https://arxiv.org/abs/2211.16231; code
    https://github.com/zhengli97/CTKD, which has the global form. Of the other one it says that two
    layers find it in both outputs; their width and their start are our choice, as is that the
    student is not taught to move its own temperature.

    Example:
        >>> import torch
        >>> from distill_kd.ctkd import CTKDLoss
        >>> loss = CTKDLoss(ramp_steps=1)
        >>> student = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, -1.0], [1.0, 0.0, 0.0]])
        >>> value = loss(student, teacher)
        >>> value.backward()
        >>> round(value.item(), 4)
        0.1684
        >>> loss.theta.grad.item() > 0  # the optimizer will lower T, with which L falls
        True
    """

    steps: Tensor

    def __init__(
        self,
        ramp_steps: int,
        form: Form = "global",
        t_start: float = 1.0,
        t_range: float = 20.0,
        initial: float = 1.0,
        hidden: int = 128,
        standardize: bool = False,
        ignore_index: int = -100,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(ignore_index, class_dim)
        check(self, "ramp_steps", ramp_steps, ramp_steps >= 1, "a whole number >= 1")
        check_choice(self, "form", form, get_args(Form))
        for name, value in (("t_start", t_start), ("t_range", t_range)):
            check_positive(self, name, value)
        check(self, "initial", initial, math.isfinite(initial), "a finite number")
        check(self, "hidden", hidden, hidden >= 1, "a whole number >= 1")
        self.ramp_steps = ramp_steps
        self.form = form
        self.t_start = t_start
        self.t_range = t_range
        self.initial = initial
        self.hidden = hidden
        self.standardize = standardize
        self.layers: nn.Sequential | None = None
        if form == "global":
            self.theta = nn.Parameter(torch.tensor(float(initial)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def setup(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Build the layers of ``form="instance"`` for as many classes as there are."""
        if self.form == "global":
            return
        classes = self.rows(student, teacher).student.shape[1]
        last = nn.Linear(self.hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, self.initial)
        layers = nn.Sequential(nn.Linear(2 * classes, self.hidden), nn.ReLU(), last)
        self.layers = layers.to(student.device)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch as a scalar, and count the step if in train mode."""
        if self.form == "instance" and self.layers is None:
            raise RuntimeError(
                "CTKDLoss: form instance has no layers yet; in an experiment they are built for "
                "the models' logits, in Python call setup(student, teacher) first"
            )
        rows = self.rows(student, teacher, targets, mask)
        # Before anything is computed: parts that are computed again find the same count.
        if self.training:
            self.steps += 1
        return rows.mean(self.losses_of(rows))

    def row_losses(self, rows: Rows) -> Tensor:
        """Return the divergence of each row at its temperature, times its square, (N)."""
        # The temperature's gradient comes from all rows and classes, and 0 * inf would be NaN.
        rows = rows.wide()
        temperature = self.temperature(rows)
        lowest = torch.finfo(rows.student.dtype).min / 2**32  # room for T^2
        student, teacher = (side.clamp_min(lowest) for side in (rows.student, rows.teacher))
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        found = divergence(
            log_probabilities(student, temperature), log_probabilities(teacher, temperature)
        )
        return found * temperature.square().squeeze(-1)

    def temperature(self, rows: Rows) -> Tensor:
        """Return T as a scalar (``"global"``) or (N, 1), whose gradient is reversed."""
        if self.layers is None:
            theta = self.theta
        else:
            logits = torch.cat([rows.teacher, rows.student], 1).detach()
            with torch.autocast(logits.device.type, enabled=False):
                theta = self.layers(logits.to(self.layers[0].weight.dtype))  # type: ignore[arg-type]
        value = theta.detach()
        # The difference is 0 and has the gradient of theta.
        reversed_theta = value - (theta - value) * self.strength()
        return self.t_start + self.t_range * reversed_theta.to(rows.student.dtype).sigmoid()

    def strength(self) -> Tensor:
        """Return lambda, how much of its gradient the temperature gets, as a scalar."""
        done = (self.steps / self.ramp_steps).clamp_max(1.0)
        return (1 - (math.pi * done).cos()) / 2
