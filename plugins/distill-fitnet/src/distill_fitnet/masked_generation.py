"""Masked generative distillation (MGD): the teacher's map generated from the masked student's.

.. code-block:: yaml

    auxiliary:
      generator:
        type: MGDGenerator
        inputs: {features: student.layer4, like: teacher.layer4}
    criterion:
      mgd:
        type: MGDLoss
        inputs: {student_features: generator, teacher_features: teacher.layer4}
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.parameters import check, check_choice
from distill_fitnet.feature_pairs import Features, PairwiseLoss, as_list
from distill_fitnet.feature_shapes import check_same
from distill_fitnet.fitted_layers import FittedLayers

Kind = Literal["channel", "spatial"]


def conv_generator(channels: int) -> nn.Sequential:
    """Return two 3x3 convolutions with a ReLU between them, which keep a map's shape."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )


class MGDGenerator(FittedLayers):
    r"""Masks the student's aligned map and generates the teacher's whole map from what is left.

    .. math::
        out = conv_{3 \times 3}(ReLU(conv_{3 \times 3}(M \odot align(s))))

    ``align`` is a 1x1 convolution where the channels differ, else nothing. All convolutions have a
    bias. In training mode each call draws a mask ``M`` for every sample: ``"channel"`` drops whole
    channels, as published for classification, ``"spatial"`` positions in all channels, as for
    detection and segmentation. In evaluation mode nothing is masked (the authors' code does).

    Args:
        kind: what is dropped: ``"channel"`` or ``"spatial"``.
        drop: the chance that one is, within [0, 1). Published: 0.15 for classification, 0.65 for
            detection and 0.75 for segmentation.
        in_channels: the student's; ``None`` takes them from ``features``.
        out_channels: the teacher's; ``None`` takes them from ``like``.

    Shape:
        - features: a map (B, C_s, H, W), or a list with one for each layer.
        - like: the teacher's, of which only the shapes are used.
        - noise: draws from [0, 1) to mask by, (B, C_t, 1, 1) or (B, 1, H, W); drawn if ``None``.
          A channel is dropped where its draw is below ``drop``, a position where its draw is above
          ``1 - drop``.
        - returns: maps (B, C_t, H, W), a list for a list.

    Raises:
        ValueError: a parameter out of range; channels that do not fit or are not known; a feature
            that is not a map; noise of another shape.
        RuntimeError: if called before its layers are built.

    Source: see ``MGDLoss``.
    """

    def __init__(
        self,
        kind: Kind = "channel",
        drop: float = 0.15,
        in_channels: list[int] | int | None = None,
        out_channels: list[int] | int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels)
        check_choice(self, "kind", kind, get_args(Kind))
        check(self, "drop", drop, 0 <= drop < 1, "within [0, 1)")
        self.kind = kind
        self.drop = drop
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the alignment and the generator of one feature."""
        return _AlignedGenerator(in_channels, out_channels)

    def setup(
        self, features: Features, like: Features | None = None, noise: Features | None = None
    ) -> None:
        """Build the layers for these features, or check that those already built fit them."""
        super().setup(features, like)

    def forward(
        self, features: Features, like: Features | None = None, noise: Features | None = None
    ) -> Features:
        """Return the generated maps; see the class for shapes."""
        # What the base applies is the alignment.
        aligned = as_list(super().forward(features, like))
        draws = [None] * len(aligned) if noise is None else as_list(noise)
        outputs = [
            _own(layer).generation(self._masked(x, draw))
            for layer, x, draw in zip(self.layers, aligned, draws, strict=True)
        ]
        return outputs[0] if isinstance(features, Tensor) else outputs

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Align one feature."""
        own = next(layer.parameters())
        aligned: Tensor = _own(layer).align(self.prepare(features).to(own.dtype))
        return aligned

    def _masked(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Return a map with what the draw says set to 0."""
        if not self.training:
            return x
        shape = (*x.shape[:2], 1, 1) if self.kind == "channel" else (len(x), 1, *x.shape[2:])
        if noise is None:
            noise = torch.rand(shape, device=x.device)
        if tuple(noise.shape) != shape:
            raise ValueError(
                f"MGDGenerator: noise for an aligned map {tuple(x.shape)} must have the shape "
                f"{shape}, got {tuple(noise.shape)}"
            )
        kept = noise >= self.drop if self.kind == "channel" else noise <= 1 - self.drop
        return x * kept


class _AlignedGenerator(nn.Module):
    """The layers for one feature, which ``MGDGenerator`` applies with a mask in between."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        differs = in_channels != out_channels
        self.align = nn.Conv2d(in_channels, out_channels, 1) if differs else nn.Identity()
        self.generation = conv_generator(out_channels)


def _own(layer: nn.Module) -> _AlignedGenerator:
    assert isinstance(layer, _AlignedGenerator)
    return layer


class MGDLoss(PairwiseLoss):
    r"""Squared distance between generated maps and the teacher's, summed, for each sample.

    .. math::
        L = \frac{\alpha}{B} \sum_l \sum_{b,c,i} (g_{lbci} - t_{lbci})^2

    The sum grows with channels and positions, so ``alpha`` belongs to certain shapes.

    Args:
        alpha: weight, >= 0. Published: 7e-5 for classification on ImageNet, 1.2e-3 on CIFAR-100,
            2e-5 for detection and segmentation.

    Shape:
        - student_features: what ``MGDGenerator`` gives, (B, C, H, W), one or a list.
        - teacher_features: of the same shapes.
        - returns: scalar, computed in float32 or wider. Only the student gets gradients.

    Raises:
        ValueError: alpha out of range; maps of different shapes.

    Source: Yang, Li, Shao, Shi, Yuan, Yuan, *Masked Generative Distillation*, ECCV 2022,
    https://arxiv.org/abs/2205.01529; code: github.com/yzd-v/MGD. ResNet-34 to ResNet-18 on
    ImageNet: 71.69.
    """

    def __init__(self, alpha: float = 7e-5) -> None:
        super().__init__()
        check(self, "alpha", alpha, 0 <= alpha < math.inf, "a finite number >= 0")
        self.alpha = alpha

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the squared distance of one layer's maps for each sample."""
        advice = "MGDGenerator changes channels only: capture maps of the same height and width"
        check_same(self, student, teacher, advice)
        return (student - teacher).square().sum() * (self.alpha / len(student))
