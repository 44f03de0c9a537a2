"""Factor transfer: an auto-encoder paraphrases the teacher, a translator imitates its factors."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from distill.parameters import Parametrized, check, check_choice
from distill_fitnet.attention_transfer import attention
from distill_fitnet.feature_pairs import Features, feature_pairs
from distill_fitnet.feature_shapes import check_maps, check_same
from distill_fitnet.fitted_layers import FittedLayers
from distill_fitnet.map_sizes import pool_to_smaller
from distill_fitnet.powers import check_power
from distill_fitnet.vectors import Reduction, unit_vectors, vector_distance

Form = Literal["factors", "channel_power"]

_SLOPE = 0.1


class FTLoss(Parametrized):
    r"""Difference of normalised factors.

    .. math::
        L = \frac{1}{B D} \sum \left| \frac{f_s}{\|f_s\|_2} - \frac{f_t}{\|f_t\|_2} \right|

    with f the factor of a sample as a vector of D numbers.

    Args:
        p: 1 for the absolute difference, a mean or sum over all elements as ``reduction`` says;
            any larger number for the p-norm of each sample's difference, a mean or sum over
            samples. In the form ``"channel_power"`` the difference is raised to p, element by
            element, and p must be whole.
        reduction: ``"mean"`` or ``"sum"``.
        form: ``"factors"``; or ``"channel_power"``, RepDistiller's loss of this name: factors are
            raised to ``power`` and averaged over channels before they are normalised, which makes
            it a kind of attention transfer. There maps may differ in channels and in size; the
            larger is pooled to the smaller.
        power: for ``"channel_power"``, a whole number >= 1.

    Shape:
        - student_factor: of a ``Translator``, (B, C, H, W).
        - teacher_factor: of a ``Paraphraser``, of the same shape.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; factors of different shapes.

    Published weights are 1000 (ImageNet) and 500 (the authors' CIFAR code); RepDistiller's 200
    belongs to ``form="channel_power"``.

    Source: Kim, Park, Kwak, *Paraphrasing Complex Network: Network Compression via Factor
    Transfer*, NeurIPS 2018, https://arxiv.org/abs/1802.04977.
    """

    def __init__(
        self,
        p: float = 1.0,
        reduction: Reduction = "mean",
        form: Form = "factors",
        power: float = 2.0,
    ) -> None:
        super().__init__()
        check_choice(self, "form", form, get_args(Form))
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check_power(self, "p", p, whole=form == "channel_power")
        check_power(self, "power", power, whole=True)
        self.p = p
        self.reduction = reduction
        self.form = form
        self.power = power

    def forward(self, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        ((student, teacher),) = feature_pairs(student_factor, teacher_factor)
        if self.form == "channel_power":
            return self._channel_power(student, teacher)
        check_same(self, student, teacher, "pick layers of the same size")
        student, teacher = unit_vectors(student.flatten(1)), unit_vectors(teacher.flatten(1))
        return vector_distance(student, teacher, self.p, self.reduction)

    def _channel_power(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        student, teacher = (
            attention(factor, self.power) for factor in pool_to_smaller(student, teacher)
        )
        difference = student - teacher
        distance = difference.abs() if self.p == 1 else difference.pow(self.p)
        return distance.mean() if self.reduction == "mean" else distance.sum()


class Paraphraser(FittedLayers):
    """Auto-encoder of a teacher's maps, whose code is the factor.

    Three 3x3 convolutions C -> C -> kC -> kC and three transposed ones back, each followed by
    batch norm if asked for and a leaky ReLU of slope 0.1; height and width stay.

    Trained in a stage of its own, on the teacher's side: with ``MSELoss`` on ``reconstruction``
    and the feature (torchdistill, RepDistiller), with ``L1Loss`` (the authors' code), or with
    ``MSELoss`` and ``reduction: sum``. Frozen afterwards.

    Args:
        in_channels: C, by default found on the first two samples.
        rate: k > 0; the factor has int(k C) channels.
        batch_norm: whether each convolution is followed by batch norm: no for factor transfer, yes
            for knowledge adaptation (He et al., 2019).

    Shape:
        - features: (B, C, H, W).
        - returns: ``factor`` (B, kC, H, W) and ``reconstruction`` (B, C, H, W).

    Raises:
        ValueError: a parameter out of range; features of other channels than the parameters say.
        RuntimeError: used before its shapes are known.

    Source: Kim, Park, Kwak, 2018, https://arxiv.org/abs/1802.04977.
    """

    one_layer = True

    def __init__(
        self, in_channels: int | None = None, rate: float = 0.5, batch_norm: bool = False
    ) -> None:
        super().__init__(in_channels, in_channels)
        check(self, "rate", rate, 0 < rate < math.inf, "a finite number > 0")
        self.rate = rate
        self.batch_norm = batch_norm
        self.build_if_known()

    # What it reconstructs is what it is given: there is nothing for ``like`` to tell.
    def setup(self, features: Features) -> None:  # type: ignore[override]
        """Build the layers for the channels of what is given, or check that they fit it."""
        super().setup(features, features)

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build encoder and decoder."""
        code = int(self.rate * in_channels)
        check(self, "rate", self.rate, code > 0, f"at least 1 / {in_channels}, the channels")
        planes = (in_channels, in_channels, code, code)
        encoder = _convolutions(nn.Conv2d, planes, self.batch_norm)
        decoder = _convolutions(nn.ConvTranspose2d, planes[::-1], self.batch_norm)
        return nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))

    def forward(self, features: Features) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the factor, and the feature as it is reconstructed from it."""
        factor = super().forward(features)
        _, decoder = self.layers[0].children()
        return {"factor": factor, "reconstruction": decoder(factor)}

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Return the factor."""
        encoder, _ = layer.children()
        return super().apply_layer(encoder, features, like)


class Translator(FittedLayers):
    """Three 3x3 convolutions that turn a student's maps into a factor like the teacher's.

    Channels go C_s -> C_s -> C_f -> C_f; batch norm and leaky ReLU as in ``Paraphraser``; height
    and width stay.

    Args:
        in_channels: C_s, by default found on the first two samples.
        out_channels: C_f; by default those of ``like``, wired to the paraphraser's factor.
        batch_norm: whether each convolution is followed by batch norm.

    Shape:
        - features: (B, C_s, H, W).
        - like: (B, C_f, H, W), of which only the shape is used.
        - returns: (B, C_f, H, W).

    Raises:
        ValueError: a parameter out of range; features of other channels than the parameters say.
        RuntimeError: used before its shapes are known.

    Source: Kim, Park, Kwak, 2018, https://arxiv.org/abs/1802.04977.
    """

    one_layer = True  # since FTLoss takes the factor of one

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.batch_norm = batch_norm
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the convolutions of one layer."""
        planes = (in_channels, in_channels, out_channels, out_channels)
        return _convolutions(nn.Conv2d, planes, self.batch_norm)


def _convolutions(
    kind: type[nn.Conv2d | nn.ConvTranspose2d], planes: Sequence[int], batch_norm: bool
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(planes):
        layers.append(kind(inputs, outputs, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.LeakyReLU(_SLOPE))
    return nn.Sequential(*layers)
