"""FitNets: regress the teacher's middle layer from the student's, and compare the two."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import check, check_choice, check_layer_weights
from distill_fitnet.feature_pairs import Features, PairwiseLoss
from distill_fitnet.feature_shapes import check_form, check_same
from distill_fitnet.fitted_layers import FittedLayers, settled

Reduction = Literal["mean", "sum", "paper"]


class HintLoss(PairwiseLoss):
    r"""Squared difference of the student's and the teacher's features, summed over layers.

    .. math::
        L = \sum_l w_l \, \| F_t^l - F_s^l \|^2 / n

    The student's features are meant to come from a regressor (``ConvRegressor``) unless they have
    the teacher's shape by themselves.

    Args:
        reduction: what the sum of squares is divided by. The three differ by a factor of millions,
            so the loss's weight goes with the choice.

            ========= ===================== ======================================================
            name      n                     used by
            ========= ===================== ======================================================
            ``mean``  number of elements    RepDistiller, mdistiller (weight 100), mmrazor
            ``sum``   1                     torchdistill's sample, where it grows with the batch
            ``paper`` 2 B                   the paper: half the squared norm of each sample
            ========= ===================== ======================================================
        layer_weights: one number >= 0 for each layer; by default 1 for all.

    Shape:
        - student_features, teacher_features: tensors of the same shape (B, ...), or as many of
          them in lists, one for each layer.
        - returns: scalar, float32 or wider. Only the student gets a gradient.

    Raises:
        ValueError: a parameter out of range; not as many features, or weights, as layers; features
            of different shapes.

    Source: Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015,
    https://arxiv.org/abs/1412.6550. There the hint is a stage of its own, followed by knowledge
    distillation; RepDistiller adds it to the cross entropy in one stage.
    """

    def __init__(
        self, reduction: Reduction = "mean", layer_weights: list[float] | None = None
    ) -> None:
        super().__init__()
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check_layer_weights(self, layer_weights)
        self.reduction = reduction
        self.layer_weights = layer_weights

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the squared difference of one layer's features."""
        check_same(self, student, teacher, "bring the student's there with a ConvRegressor")
        if self.reduction == "paper":
            return F.mse_loss(student, teacher, reduction="sum") / (2 * len(student))
        return F.mse_loss(student, teacher, reduction=self.reduction)


class ConvRegressor(FittedLayers):
    """Convolution, batch norm and ReLU that bring a student's feature to the teacher's shape.

    What is not given is found on the first two samples, with ``like`` wired to the feature of the
    teacher. Without ``kernel_size`` the sizes decide, as in RepDistiller:

    =============================== =============================================================
    student's size                  layer
    =============================== =============================================================
    twice the teacher's             convolution 3x3, stride 2, padding 1
    half the teacher's              transposed convolution 4x4, stride 2, padding 1
    otherwise as large or larger    convolution without padding, kernel 1 + H_s - H_t (so 1x1 for
                                    equal sizes; far larger student maps make it very large)
    anything else, such as 7 -> 28  convolution 1x1, then bilinear interpolation (RepDistiller
                                    refuses these)
    vectors                         linear layer; for a map, the same at every position
    maps, for a vector              mean over positions, linear layer
    =============================== =============================================================

    Height and width must both follow a row for it to be taken. Where maps later have another size
    than the first ones, the result is interpolated to the size of ``like``.

    This is for one layer; several layers take a regressor each.

    Args:
        in_channels: channels of the student's feature, or the length of its vector.
        out_channels: those of the teacher's.
        in_size: height and width of the student's maps, ``[]`` for vectors.
        out_size: those of the teacher's; without ``like`` and ``out_size`` the student's own.
        kernel_size: an odd number for a convolution of this kernel that keeps the size, whatever
            the sizes are; maps of another size are interpolated after it. For maps only.
        batch_norm: whether to normalise by the batch.
        relu: whether to end with a ReLU. It suits a teacher's feature taken after one.
        bias: whether the convolution has a bias.

    The defaults are RepDistiller's. A plain linear map, as mmrazor has it, is ``kernel_size=1,
    batch_norm=False, relu=False, bias=False``.

    Shape:
        - features: (B, C_s, H_s, W_s) or (B, D_s).
        - like: (B, C_t, H_t, W_t) or (B, D_t), of which only the shape is used; a map for vectors
          and a vector for maps too.
        - returns: the shape of ``like``.

    Raises:
        ValueError: a parameter out of range; features that are neither maps nor vectors, or of
            another shape than the parameters say.
        RuntimeError: used before its shapes are known.

    Source: Romero et al., 2015, https://arxiv.org/abs/1412.6550, for a convolutional regressor;
    RepDistiller's ``ConvReg`` for the rule, batch norm and ReLU.
    """

    one_layer = True  # since there is one size for each side

    def __init__(
        self,
        in_channels: int | None = None,
        out_channels: int | None = None,
        in_size: list[int] | None = None,
        out_size: list[int] | None = None,
        kernel_size: int | None = None,
        batch_norm: bool = True,
        relu: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels)
        for name, size in (("in_size", in_size), ("out_size", out_size)):
            fits = not size or (len(size) == 2 and min(size) > 0)
            check(self, name, size, fits, "[height, width], [] for vectors, or None")
        odd = kernel_size is None or (kernel_size % 2 == 1 and kernel_size > 0)
        check(self, "kernel_size", kernel_size, odd, "an odd number > 0, or None")
        self.in_size = in_size
        self.out_size = out_size
        self.kernel_size = kernel_size
        self.batch_norm = batch_norm
        self.relu = relu
        self.bias = bias
        self._sizes: tuple[list[int], list[int]] = ([1, 1], [1, 1])
        if in_size is not None and out_size is not None:
            self._sizes = (in_size, out_size)
            self.build_if_known()
        elif kernel_size is not None:  # which does for maps of any size
            self.build_if_known()

    def prepare(self, features: Tensor) -> Tensor:
        """Refuse what is neither map nor vector, and vectors where a kernel size was given."""
        check_form(self, features, *((2, 4) if self.kernel_size is None else (4,)))
        return features

    def setup(self, features: Features, like: Features | None = None) -> None:
        """Build the layers for the shapes of what is given, or check that they fit it."""
        [given] = self.listed(features)
        in_size = settled(self, "in_size", self.in_size, _size(given), [given])
        out_size = in_size if self.out_size is None else self.out_size
        if like is not None:
            [target] = self.listed(like)
            out_size = settled(self, "out_size", self.out_size, _size(target), [target])
        self._sizes = (in_size, out_size)
        super().setup(features, like)

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the layers, of which ``apply_layer`` may interpolate between the first two."""
        in_size, out_size = self._sizes
        project: nn.Module
        if in_size and out_size:
            project = self._convolution(in_channels, out_channels)
        else:
            project = nn.Linear(in_channels, out_channels, self.bias)
        if in_size and not out_size:
            project = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), project)
        if out_size and not in_size:
            project = nn.Sequential(project, nn.Unflatten(1, (out_channels, 1, 1)))
        norm: type[nn.Module] = nn.BatchNorm2d if out_size else nn.BatchNorm1d
        return nn.Sequential(
            OrderedDict(
                project=project,
                norm=norm(out_channels) if self.batch_norm else nn.Identity(),
                activate=nn.ReLU() if self.relu else nn.Identity(),
            )
        )

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Return the feature in the shape of ``like``."""
        project, norm, activate = layer.children()
        fitted = super().apply_layer(project, features, like)
        size = self.out_size if like is None else _size(like)
        if size and size != _size(fitted):
            fitted = F.interpolate(fitted, size, mode="bilinear", align_corners=False)
        activated: Tensor = activate(norm(fitted))
        return activated

    def _convolution(self, in_channels: int, out_channels: int) -> nn.Module:
        size = self.kernel_size
        if size is not None:
            return nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=self.bias)
        sizes = list(zip(*self._sizes, strict=True))
        if all(i == 2 * o for i, o in sizes):
            return nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=self.bias)
        if all(2 * i == o for i, o in sizes):
            return nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, bias=self.bias)
        high, wide = (1 + i - o for i, o in sizes)
        kernel = (high, wide) if min(high, wide) > 0 else (1, 1)
        return nn.Conv2d(in_channels, out_channels, kernel, bias=self.bias)


def _size(feature: Tensor) -> list[int]:
    return list(feature.shape[2:])
