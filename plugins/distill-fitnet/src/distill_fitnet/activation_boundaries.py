"""Distillation of activation boundaries, Heo et al. 2019: neurons that agree in sign."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import check, check_choice, check_layer_weights
from distill_fitnet.feature_pairs import PairwiseLoss, halving_weights
from distill_fitnet.feature_shapes import check_same
from distill_fitnet.fitted_layers import FittedLayers

Reduction = Literal["batchmean", "sum"]


class ABConnector(FittedLayers):
    """Bring the student's maps to the teacher's channels: 1x1 convolution, batch norm.

    The convolution has no bias; its weights start normally distributed with variance
    ``2 / out_channels``, as in the authors' code. There is no activation: what comes out is
    compared by ``ABLoss`` with the teacher's pre-activations.

    RepDistiller's connector is another one: nothing where the shapes are equal, else the
    convolution of its FitNet regressor, with a bias and a kernel that depends on the sizes.

    Args:
        in_channels: channels of the student's maps; ``None`` finds them in ``setup``. A list has
            one number for each layer.
        out_channels: channels of the teacher's maps, likewise; ``None`` takes those of ``like``.

    Shape:
        - features: (B, C_s, H, W), or a list of such, one for each layer.
        - like: the teacher's maps (B, C_t, H', W'), likewise; only its shape is used.
        - returns: (B, C_t, H, W), or a list of such.

    Raises:
        ValueError: channels below 1, lists of different length, features that are no maps, or
            shapes that do not fit the channels.
        RuntimeError: ``forward`` before the channels are known.

    Source: Heo, Lee, Yun, Choi, *Knowledge Transfer via Distillation of Activation Boundaries
    Formed by Hidden Neurons*, AAAI 2019, https://arxiv.org/abs/1811.03233.
    """

    def __init__(
        self,
        in_channels: list[int] | int | None = None,
        out_channels: list[int] | int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the connector of one layer."""
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / out_channels))
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class ABLoss(PairwiseLoss):
    r"""Hinge-like loss that puts each neuron of the student on the teacher's side of zero.

    .. math::
        L = c \sum_{l=1}^{L} \frac{w_l}{B} \sum_i \begin{cases}
            \max(s_i + m, 0)^2 & t_i \le 0 \\
            \max(m - s_i, 0)^2 & t_i > 0 \end{cases}
        \qquad w_l = 2^{l - L}, \quad c = 3 / 1000

    Over *all* elements of a layer the loss is a sum, only samples are averaged: the learning rate
    depends on the size of the maps.

    Features must be taken **before** the activation, on both sides: behind a ReLU every inactive
    neuron of the teacher is exactly 0 and the student's can never fall below ``-margin``. Where
    the ReLU works in place, the layer in front of it shows what comes after. The student's
    features usually come from ``ABConnector``.

    The method's first stage has this loss alone, on the student without its classifier; the second
    trains the student by labels (RepDistiller) or by the teacher's softened classes.

    Args:
        margin: m > 0, by which the student must be on its side.
        scale: c > 0. 3/1000 in the authors' code; 1 in torchdistill.
        layer_weights: w_l, one for each layer; ``None`` means 1 for the last layer and half of the
            next one's for each layer before, so list the shallowest layer first. All 1 in
            torchdistill.
        reduction: ``"batchmean"`` divides by B; ``"sum"`` does not.

    Shape:
        - student_features, teacher_features: tensors (B, ...) of the same shape, or lists of such,
          one for each layer.
        - returns: scalar, computed in float32, or in float64 if one of the features is.

    Raises:
        ValueError: a parameter out of range; features of different shape or number; not as many
            weights as layers.

    Equals, with these parameters:
        - the authors' code and RepDistiller: the defaults.
        - torchdistill: ``scale=1, layer_weights=<its weights>``.

    Source: Heo, Lee, Yun, Choi, *Knowledge Transfer via Distillation of Activation Boundaries
    Formed by Hidden Neurons*, AAAI 2019, https://arxiv.org/abs/1811.03233. CIFAR-100, as
    RepDistiller has it: 69.47 (resnet56 -> resnet20), 73.17 (resnet32x4 -> resnet8x4), 72.50
    (WRN-40-2 -> WRN-16-2), 70.94 (vgg13 -> vgg8).
    """

    def __init__(
        self,
        margin: float = 1.0,
        scale: float = 0.003,
        layer_weights: list[float] | None = None,
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__()
        check(self, "margin", margin, 0 < margin < math.inf, "a finite number > 0")
        check(self, "scale", scale, 0 < scale < math.inf, "a finite number > 0")
        check_layer_weights(self, layer_weights)
        check_choice(self, "reduction", reduction, get_args(Reduction))
        self.margin = margin
        self.scale = scale
        self.layer_weights = layer_weights
        self.reduction = reduction

    def weights_of(self, layers: int) -> Sequence[float]:
        """Return a weight for each of so many layers."""
        return halving_weights(layers) if self.layer_weights is None else self.layer_weights

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one layer, times the scale."""
        check_same(self, student, teacher, "bring the student's to it with ABConnector")
        # How far the student is from being on the teacher's side of zero, and that by the margin.
        missing = self.margin + torch.where(teacher > 0, -1.0, 1.0).to(student.dtype) * student
        loss = F.relu(missing, inplace=True).square().sum()
        return loss * (self.scale / (len(student) if self.reduction == "batchmean" else 1))
