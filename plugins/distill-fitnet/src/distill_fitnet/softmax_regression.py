"""Softmax regression representation learning (SRRL): the student's features in the teacher's head.

In an experiment's file the connector adapts the student's last map, and the teacher's own head
classifies what comes out:

.. code-block:: yaml

    auxiliary:
      connector:
        type: SRRLConnector
        inputs: {features: student.layer4, like: teacher.layer4}
      head: {module: teacher.fc, inputs: {input: connector.pooled}}
    criterion:
      srrl:
        type: SRRLLoss
        inputs:
          student_features: connector.map
          teacher_features: teacher.layer4
          student_logits: head
          teacher_logits: teacher
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import Parametrized, check
from distill_fitnet.activation_boundaries import ABConnector
from distill_fitnet.feature_pairs import feature_pairs
from distill_fitnet.feature_shapes import check_same
from distill_fitnet.vectors import as_vectors


class SRRLConnector(ABConnector):
    """Adapts the student's last map to the teacher's channels: 1x1 convolution, batch norm, ReLU.

    The convolution has no bias; its weights start normally distributed with variance
    ``2 / out_channels``. Only the ReLU sets it apart from ``ABConnector``.

    Args:
        in_channels: the student's; ``None`` takes them from ``features``.
        out_channels: the teacher's; ``None`` takes them from ``like``.

    Shape:
        - features: (B, C_s, H, W).
        - like: the teacher's map (B, C_t, H', W'), of which only the shape is used.
        - returns: ``map`` (B, C_t, H, W) and ``pooled`` (B, C_t), its average over positions.

    Raises:
        ValueError: if channels do not fit, are not known, or a feature is not a map.
        RuntimeError: if called before its layers are built.

    Source: see ``SRRLLoss``.
    """

    one_layer = True

    def __init__(self, in_channels: int | None = None, out_channels: int | None = None) -> None:
        super().__init__(in_channels, out_channels)

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build convolution, batch norm and ReLU."""
        return nn.Sequential(super().layer(in_channels, out_channels), nn.ReLU())

    # The parts have names, since the loss takes one and the teacher's head the other.
    def forward(  # type: ignore[override]
        self, features: Tensor, like: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the adapted map and its average over positions."""
        adapted = super().forward(features, like)
        assert isinstance(adapted, Tensor), "a tensor comes back for a tensor"
        return {"map": adapted, "pooled": adapted.mean((2, 3))}


class SRRLLoss(Parametrized):
    r"""Distance of pooled features plus distance of the logits that the teacher's head makes.

    .. math::
        L = \frac{\alpha}{B C} \sum_{b,c} (\bar s_{bc} - \bar t_{bc})^2
            + \frac{\beta}{B K} \sum_{b,k} (h(\bar s_b)_k - z_{t,bk})^2

    ``s`` is the adapted student's map (see ``SRRLConnector``), a bar the average over positions,
    ``h`` the teacher's frozen head, through which gradients pass, and ``z_t`` the teacher's logits.
    The cross entropy with the labels is a term of its own.

    Args:
        alpha: weight of the features, >= 0.
        beta: weight of the logits, >= 0. Published on ImageNet with 1, on CIFAR-100 with 5, which
            is also the default of cls_KD.

    Shape:
        - student_features, teacher_features: maps (B, C, H, W) of any sizes, or pooled (B, C).
        - student_logits: the teacher's head on the pooled adapted features, (B, K).
        - teacher_logits: (B, K).
        - returns: scalar, computed in float32 or wider. Only the student's side gets gradients.

    Raises:
        ValueError: a weight out of range; features or logits of different shapes.

    Source: Yang, Martinez, Bulat, Tzimiropoulos, *Knowledge distillation via softmax regression
    representation learning*, ICLR 2021, https://openreview.net/forum?id=ZzwDy_wiWv; ResNet-34 to
    ResNet-18 on ImageNet 71.73 (as later papers tabulate it).
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        check(self, "alpha", alpha, 0 <= alpha < math.inf, "a finite number >= 0")
        check(self, "beta", beta, 0 <= beta < math.inf, "a finite number >= 0")
        self.alpha = alpha
        self.beta = beta

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        features, logits = feature_pairs(
            [student_features, student_logits], [teacher_features, teacher_logits]
        )
        student, teacher = (as_vectors(self, feature) for feature in features)
        check_same(self, student, teacher, "adapt the student's map with SRRLConnector")
        check_same(self, *logits, "student_logits come from the teacher's head")
        return self.alpha * F.mse_loss(student, teacher) + self.beta * F.mse_loss(*logits)
