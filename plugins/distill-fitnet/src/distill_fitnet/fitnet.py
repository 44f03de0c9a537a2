"""FitNets: regress the teacher's middle layer from the student's, and compare the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_fitnet.feature_pairs import Features, feature_pairs
from distill_fitnet.parameters import check, check_choice

Reduction = Literal["mean", "sum", "paper"]

_Shape = TypeVar("_Shape", int, "list[int]")


class HintLoss(nn.Module):
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
        weights: one number >= 0 for each layer; by default 1 for all.

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

    def __init__(self, reduction: Reduction = "mean", weights: list[float] | None = None) -> None:
        super().__init__()
        check_choice(self, "reduction", reduction, get_args(Reduction))
        check_weights(self, weights)
        self.reduction = reduction
        self.weights = weights

    def forward(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        pairs = feature_pairs(student_features, teacher_features)
        errors = [self._squared_error(student, teacher) for student, teacher in pairs]
        return sum_over_layers(self, errors, self.weights)

    def _squared_error(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_same_shape(self, student, teacher, "bring the student's there with a ConvRegressor")
        if self.reduction == "paper":
            return F.mse_loss(student, teacher, reduction="sum") / (2 * len(student))
        return F.mse_loss(student, teacher, reduction=self.reduction)


class ConvRegressor(nn.Module):
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
    vectors                         linear layer
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
        - like: (B, C_t, H_t, W_t) or (B, D_t), of which only the shape is used.
        - returns: the shape of ``like``.

    Raises:
        ValueError: a parameter out of range; features that are neither maps nor vectors, or of
            another shape than the parameters say; a map to be made from vectors or the reverse.
        RuntimeError: used before its shapes are known.

    Source: Romero et al., 2015, https://arxiv.org/abs/1412.6550, for a convolutional regressor;
    RepDistiller's ``ConvReg`` for the rule, batch norm and ReLU.
    """

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
        super().__init__()
        check_channels(self, in_channels=in_channels, out_channels=out_channels)
        for name, size in (("in_size", in_size), ("out_size", out_size)):
            fits = not size or (len(size) == 2 and min(size) > 0)
            check(self, name, size, fits, "[height, width], [] for vectors, or None")
        odd = kernel_size is None or (kernel_size % 2 == 1 and kernel_size > 0)
        check(self, "kernel_size", kernel_size, odd, "an odd number > 0, or None")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.in_size = in_size
        self.out_size = out_size
        self.kernel_size = kernel_size
        self.batch_norm = batch_norm
        self.relu = relu
        self.bias = bias
        self.project: nn.Module | None = None
        if in_channels and out_channels:
            if kernel_size is not None and in_size is None:
                self._build(in_channels, out_channels, [1, 1], [1, 1])  # no size matters
            elif in_size is not None and out_size is not None:
                self._build(in_channels, out_channels, in_size, out_size)

    def setup(self, features: Tensor, like: Tensor | None = None) -> None:
        """Build the layers for the shapes of what is given, or check that they fit it."""
        dimensions = (2, 4) if self.kernel_size is None else (4,)
        check_feature(self, "features", features, dimensions)
        if like is not None:
            check_feature(self, "like", like, dimensions)
        in_channels = settled(self, "in_channels", self.in_channels, features, channels)
        out_channels = settled(self, "out_channels", self.out_channels, like, channels)
        in_size = settled(self, "in_size", self.in_size, features, _size)
        own = in_size if like is None and self.out_size is None else self.out_size
        out_size = settled(self, "out_size", own, like, _size)
        if self.project is None:
            self._build(in_channels, out_channels, in_size, out_size)
        place(self, features)

    def forward(self, features: Tensor, like: Tensor | None = None) -> Tensor:
        """Return the feature in the shape of ``like``."""
        project = built(self, self.project)
        fitted: Tensor = project(features.to(next(project.parameters()).dtype))
        size = self.out_size if like is None else _size(like)
        if size and size != _size(fitted):
            fitted = F.interpolate(fitted, size, mode="bilinear", align_corners=False)
        activated: Tensor = self.activate(self.norm(fitted))
        return activated

    def _build(
        self, in_channels: int, out_channels: int, in_size: list[int], out_size: list[int]
    ) -> None:
        if bool(in_size) != bool(out_size):
            raise ValueError(
                f"{type(self).__name__}: cannot make a map from vectors or vectors from a map: "
                f"sizes are {in_size} and {out_size}; flatten or pool the maps first"
            )
        if in_size:
            self.project = self._convolution(in_channels, out_channels, in_size, out_size)
        else:
            self.project = nn.Linear(in_channels, out_channels, self.bias)
        norm = nn.BatchNorm2d if in_size else nn.BatchNorm1d
        self.norm = norm(out_channels) if self.batch_norm else nn.Identity()
        self.activate = nn.ReLU() if self.relu else nn.Identity()

    def _convolution(
        self, in_channels: int, out_channels: int, in_size: list[int], out_size: list[int]
    ) -> nn.Module:
        size = self.kernel_size
        if size is not None:
            return nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=self.bias)
        sizes = list(zip(in_size, out_size, strict=True))
        if all(i == 2 * o for i, o in sizes):
            return nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=self.bias)
        if all(2 * i == o for i, o in sizes):
            return nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, bias=self.bias)
        high, wide = (1 + i - o for i, o in sizes)
        kernel = (high, wide) if min(high, wide) > 0 else (1, 1)
        return nn.Conv2d(in_channels, out_channels, kernel, bias=self.bias)


def check_weights(owner: nn.Module, weights: Sequence[float] | None) -> None:
    """Refuse layer weights that are negative or not finite."""
    fits = weights is None or all(0 <= weight < math.inf for weight in weights)
    check(owner, "weights", weights, fits, "finite numbers >= 0, one for each layer, or None")


def sum_over_layers(
    owner: nn.Module, losses: Sequence[Tensor], weights: Sequence[float] | None
) -> Tensor:
    """Return the weighted sum of the layers' losses."""
    kind = type(owner).__name__
    if not losses:
        raise ValueError(f"{kind}: needs the features of one layer at least, got none")
    if weights is None:
        return reduce(torch.add, losses)
    if len(weights) != len(losses):
        raise ValueError(f"{kind}: {len(weights)} weights do not fit {len(losses)} layers")
    return reduce(torch.add, (w * loss for w, loss in zip(weights, losses, strict=True)))


def check_same_shape(owner: nn.Module, student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Refuse two features of different shapes, telling a remedy."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{type(owner).__name__}: the student's feature {tuple(student.shape)} and the "
            f"teacher's {tuple(teacher.shape)} must have the same shape; {remedy}"
        )


def check_feature(
    owner: nn.Module, name: str, feature: Tensor, dimensions: Sequence[int] = (4,)
) -> None:
    """Refuse what is no tensor of so many dimensions, such as a list of several layers'."""
    if not isinstance(feature, Tensor) or feature.ndim not in dimensions:
        kinds = {2: "vectors (B, D)", 4: "maps (B, C, H, W)"}
        wanted = " or ".join(kinds[number] for number in dimensions)
        got = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise ValueError(f"{type(owner).__name__}: {name} must be {wanted} of one layer, got {got}")


def check_channels(owner: nn.Module, **named: int | None) -> None:
    """Refuse numbers of channels below 1."""
    for name, value in named.items():
        check(owner, name, value, value is None or value > 0, "a number > 0, or None")


def channels(feature: Tensor) -> int:
    """Return the channels of a map, or the length of a vector."""
    return feature.shape[1]


def _size(feature: Tensor) -> list[int]:
    return list(feature.shape[2:])


def settled(
    owner: nn.Module,
    name: str,
    given: _Shape | None,
    feature: Tensor | None,
    measure: Callable[[Tensor], _Shape],
) -> _Shape:
    """Return a part of a shape that was given as a parameter, or else is found on a feature.

    Raises:
        ValueError: if the two do not agree, or there is neither.
    """
    kind = type(owner).__name__
    if feature is None:
        if given is None:
            raise ValueError(f"{kind}: {name} is not known; give it, or wire `like`")
        return given
    found = measure(feature)
    if given not in (None, found):
        shape = tuple(feature.shape)
        raise ValueError(f"{kind}: {name} is {given}, but the feature {shape} has {found} there")
    return found


def place(module: nn.Module, features: Tensor) -> None:
    """Move a module to where features are; its type becomes float32, or float64 as theirs."""
    module.to(features.device, torch.promote_types(features.dtype, torch.float32))


_Built = TypeVar("_Built", bound=nn.Module)


def built(owner: nn.Module, layers: _Built | None) -> _Built:
    """Return layers that must have been built by now."""
    if layers is None:
        raise RuntimeError(
            f"{type(owner).__name__} has no layers yet: call setup with two samples first, or give "
            "all of its shapes as parameters"
        )
    return layers
