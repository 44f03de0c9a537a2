"""Inter-channel correlation (ICKD), Liu et al. 2021: which channels of a map go together."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill import gather as global_rows
from distill.parameters import (
    Parametrized,
    check,
    check_channels,
    check_choice,
    check_layer_weights,
)
from distill_relational.batch_relations import Gather, full_precision, in_one_type
from distill_relational.channel_correlations import correlation_difference
from distill_relational.feature_pairs import Features, in_layers, sum_over_layers

Reduction = Literal["batch", "batch_squared"]


class ICKDEmbedding(Parametrized):
    """Bring the student's map to the teacher's channels by a convolution and batch norm.

    Height and width stay as they are; they may differ from the teacher's. This is for one layer;
    several layers take an embedding each.

    Args:
        in_channels: channels of the student's map; ``None`` finds them in ``setup``.
        out_channels: those of the teacher's; ``None`` takes them from ``like``.
        kernel_size: 1, as published on CIFAR-100, or another odd number; 3 as on ImageNet.

    Shape:
        - features: (B, C_s, H, W).
        - like: (B, C_t, H', W'), of which only the channels are used.
        - returns: (B, C_t, H, W).

    Raises:
        ValueError: a parameter out of range; features that are no maps, or have other channels;
            ``like`` missing where ``out_channels`` is not known.
        RuntimeError: ``forward`` before the channels are known.

    Source: Liu et al., *Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation*, ICCV 2021, https://arxiv.org/abs/2202.03680, and the authors' code.
    """

    def __init__(
        self, in_channels: int | None = None, out_channels: int | None = None, kernel_size: int = 1
    ) -> None:
        super().__init__()
        check_channels(self, "in_channels", in_channels)
        check_channels(self, "out_channels", out_channels)
        odd = kernel_size > 0 and kernel_size % 2 == 1
        check(self, "kernel_size", kernel_size, odd, "an odd number > 0")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.layers: nn.Sequential | None = None
        if in_channels is not None and out_channels is not None:
            self.layers = self._built(in_channels, out_channels)

    def setup(self, features: Tensor, like: Tensor | None = None) -> None:
        """Build the layers for these maps, or check that those there are fit them."""
        self.in_channels = self._settled("in_channels", self.in_channels, features)
        if like is not None:
            self.out_channels = self._settled("out_channels", self.out_channels, like)
        if self.out_channels is None:
            raise ValueError(
                "ICKDEmbedding: give out_channels, or wire the teacher's map to `like`, whose "
                "channels say what to build"
            )
        if self.layers is None:
            self.layers = self._built(self.in_channels, self.out_channels)
        self.layers.to(features.device, torch.promote_types(features.dtype, torch.float32))

    def forward(self, features: Tensor, like: Tensor | None = None) -> Tensor:
        """Return the embedded map; see the class for shapes."""
        if self.layers is None:
            raise RuntimeError(
                "ICKDEmbedding has no layers yet: call setup with maps, or give in_channels and "
                "out_channels"
            )
        self._settled("in_channels", self.in_channels, features)
        own = next(self.layers.parameters())
        embedded: Tensor = self.layers(features.to(own.dtype))
        return embedded

    def _built(self, in_channels: int, out_channels: int) -> nn.Sequential:
        size = self.kernel_size
        conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))

    def _settled(self, name: str, known: int | None, features: Tensor) -> int:
        if features.ndim != 4:
            raise ValueError(
                f"ICKDEmbedding: features must be maps (B, C, H, W), got {tuple(features.shape)}"
            )
        found = features.shape[1]
        if known is not None and known != found:
            raise ValueError(
                f"ICKDEmbedding: {name} is {known}, but maps of shape {tuple(features.shape)} have "
                f"{found}"
            )
        return found


class ICKDLoss(Parametrized):
    r"""Squared difference of the correlations of channels, sample by sample, summed over layers.

    .. math::
        G = F F^\top, \quad \hat G_i = \frac{G_i}{\|G_i\|_2}, \qquad
        L = \sum_l \frac{w_l}{C B} \sum_b \| \hat G_s - \hat G_t \|_F^2

    F has a channel's map as a row, so G is C x C for each sample.

    With ``reduction: batch``, a mean over samples, it does **not** depend on the batch of one
    process. With ``batch_squared`` it **does**, through the number of samples alone: twice as many
    processes double the loss, unless ``gather: all`` counts the samples of all.

    Correlations are compared, and their gradient is computed, for max(2**24, C²) of them at a time
    (2**19 on a CPU), in three arrays: for up to 4096 channels 192 MiB in float32 (6 MiB on a CPU up
    to 724). The gradient takes as much as the student's map on top, and twice that, without the
    arrays, in the backward; measured on a CPU 10.5 MiB for a map of 4.

    Args:
        reduction: ``"batch"`` as above, the authors' code for CIFAR-100; ``"batch_squared"``
            divides by C B², the authors' code for ImageNet and torchdistill. A weight w for the
            latter at a batch of B is a weight w / B for the former: 500 at 256 is 1.953125.
        layer_weights: one number >= 0 for each layer; by default 1 for all.
        gather: ``"none"`` or ``"all"``, whose samples are counted.

    Shape:
        - student_features: what ``ICKDEmbedding`` gives, (B, C, H, W), or a list with one for each
          layer.
        - teacher_features: (B, C, H', W'), likewise.
        - returns: scalar, float32 or wider. Only the student gets a gradient, which cannot be
          differentiated again. Channels of zeros have correlations of 0; a channel counts as zeros
          where its products with all channels have a norm of 1e-12 or less, as in maps of about
          1e-7.

    Raises:
        ValueError: a parameter out of range; not as many features, or weights, as layers; features
            that are no maps, not of the same batch, or of other channels.

    Weight 2.5 on CIFAR-100; 500 with ``batch_squared`` on ImageNet.

    Source: Liu et al., *Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation*, ICCV 2021, https://arxiv.org/abs/2202.03680, and the authors' code.
    """

    def __init__(
        self,
        reduction: Reduction = "batch",
        layer_weights: list[float] | None = None,
        gather: Gather = "none",
    ) -> None:
        super().__init__()
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check_layer_weights(self, layer_weights)
        check_choice(self, "gather", gather, get_args(Gather))
        self.reduction = reduction
        self.layer_weights = layer_weights
        self.gather = gather

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        layers = in_layers(
            self, student_features=student_features, teacher_features=teacher_features
        )
        losses = [self._layer_loss(*maps) for maps in layers]
        return sum_over_layers(self, losses, self.layer_weights)

    def _layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"ICKDLoss: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must "
                "be of the same batch and have as many channels; put an ICKDEmbedding before the "
                "loss"
            )
        student, teacher = in_one_type(student, teacher.detach())
        with full_precision(student):
            each = correlation_difference(student.flatten(2), teacher.flatten(2))
        if self.gather == "all":
            # The samples' losses are all that the batch has to do with each other.
            each = global_rows(each)
        mean = each.mean() / student.shape[1]
        return mean if self.reduction == "batch" else mean / len(each)
