"""Knowledge review (KR, ReviewKD): deeper levels of the student reviewed at each shallower one.

.. code-block:: yaml

    auxiliary:
      fusion:
        type: ReviewFusion
        inputs:
          features:
            [student.layer1, student.layer2, student.layer3, student.layer4, student.avgpool]
          like: [teacher.layer1, teacher.layer2, teacher.layer3, teacher.layer4, teacher.avgpool]
    criterion:
      review:
        type: HCLLoss
        inputs:
          student_features: fusion
          teacher_features:
            [teacher.layer1, teacher.layer2, teacher.layer3, teacher.layer4, teacher.avgpool]
        weight: {start: 0.0, end: 5.0, over: 20}

The warm-up of the loss is the framework's ``weight: {start, end, over}``, as above: published
with 20 epochs on CIFAR-100 and none on ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import check
from distill_fitnet.feature_pairs import Features, PairwiseLoss, as_list
from distill_fitnet.feature_shapes import check_same
from distill_fitnet.fitted_layers import FittedLayers

MOST_MID_CHANNELS = 512


class ReviewFusion(FittedLayers):
    r"""Fuses each level of the student with all deeper ones by attention, from deep to shallow.

    .. math::
        x_l = BN(conv_{1 \times 1}(s_l)), \qquad
        r_l = a_1 \odot x_l + a_2 \odot up(r_{l+1}), \qquad
        out_l = BN(conv_{3 \times 3}(r_l))

    The two attention maps ``a = sigmoid(conv1x1([x_l, up(r_{l+1})]))`` are shared by all channels;
    ``up`` resizes to the level's size by nearest neighbour. The deepest level has no attention:
    ``r_L = x_L``. Where the teacher's map has another size, ``r_l`` is resized to it.

    Args:
        in_channels: the student's, one for each level; ``None`` takes them from ``features``.
        out_channels: the teacher's; ``None`` takes them from ``like``.
        mid_channels: of what is fused; ``None`` is the deepest level's of the student, at most 512,
            as published on CIFAR-100 and for ResNet-18 (MobileNet on ImageNet: 256).

    Shape:
        - features: maps (B, C, H, W) from shallow to deep; a pooled vector (B, C) is a 1x1 map. In
          training mode a batch norm needs more than one value: no batches of a single pooled
          vector.
        - like: the teacher's of the same levels, of which only the shapes are used. Without it
          maps keep the student's sizes.
        - returns: a list of maps, shallow to deep, with the teacher's channels and sizes.

    Raises:
        ValueError: if channels do not fit, are not known, or there is not one feature a level.
        RuntimeError: if called before its layers are built.

    Source: Chen, Liu, Zhao, Jia, *Distilling Knowledge via Knowledge Review*, CVPR 2021,
    https://arxiv.org/abs/2104.09044; code: github.com/dvlab-research/ReviewKD. Its ImageNet models
    take maps after the ReLU, which has overwritten what was recorded before it; mdistiller's take
    them before it. ResNet-34 to ResNet-18 on ImageNet: 71.61, with layer1 to layer4 and the pooled
    vector.
    """

    def __init__(
        self,
        in_channels: list[int] | None = None,
        out_channels: list[int] | None = None,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels)
        fits = mid_channels is None or mid_channels >= 1
        check(self, "mid_channels", mid_channels, fits, "a whole number >= 1, or None")
        self.mid_channels = mid_channels
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build a level, as yet without attention."""
        return _Level(in_channels, self._mid_channels(), out_channels)

    def build_if_known(self) -> None:
        """Build all levels; each but the deepest gets attention."""
        super().build_if_known()
        for level in list(self.layers)[:-1]:
            assert isinstance(level, _Level)
            level.attention = nn.Sequential(
                nn.Conv2d(2 * self._mid_channels(), 2, kernel_size=1), nn.Sigmoid()
            )

    def prepare(self, features: Tensor) -> Tensor:
        """Return a feature as a map."""
        return super().prepare(_as_1x1_map(features))

    def forward(self, features: Features, like: Features | None = None) -> list[Tensor]:
        """Return a map for each level, from shallow to deep."""
        # What the base applies is the 1x1 convolution of each level; it checks what is given.
        reduced = as_list(super().forward(features, like))
        targets = reduced if like is None else [self.prepare(t) for t in as_list(like)]
        residual: Tensor | None = None
        outputs: list[Tensor] = []
        levels = zip(self.layers, reduced, targets, strict=True)
        for level, x, target in reversed(list(levels)):
            assert isinstance(level, _Level)
            residual = _resized(level.fuse(x, residual), target)
            outputs.append(level.expand(residual))
        return outputs[::-1]

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Reduce the channels of one level."""
        assert isinstance(layer, _Level)
        return super().apply_layer(layer.reduce, features, like)

    def _mid_channels(self) -> int:
        assert self.in_channels is not None, "layers are built when channels are known"
        return self.mid_channels or min(MOST_MID_CHANNELS, self.in_channels[-1])


class _Level(nn.Module):
    """The layers of one level; ``attention`` is there if a deeper level comes in."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = _conv_with_norm(in_channels, mid_channels, kernel_size=1)
        self.expand = _conv_with_norm(mid_channels, out_channels, kernel_size=3)
        self.attention: nn.Module | None = None

    def fuse(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Weigh a level's map and the next deeper one's by attention, and add them."""
        if self.attention is None or residual is None:
            return x
        residual = _resized(residual, x)
        own, deeper = self.attention(torch.cat((x, residual), 1)).split(1, dim=1)
        fused: Tensor = x * own + residual * deeper
        return fused


def _conv_with_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _resized(features: Tensor, target: Tensor) -> Tensor:
    """Return a map in the height and width of another one."""
    size = target.shape[-2:]
    return features if features.shape[-2:] == size else F.interpolate(features, tuple(size))


def _as_1x1_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.ndim == 2 else features


class HCLLoss(PairwiseLoss):
    r"""Hierarchical context loss: squared distance of maps at several sizes, summed over levels.

    .. math::
        L = \sum_l \frac{MSE(s_l, t_l) + \sum_j 2^{-j} \, MSE(pool_{k_j}(s_l), pool_{k_j}(t_l))}
                        {1 + \sum_j 2^{-j}}

    ``k_1, k_2, ...`` are those output sizes that are smaller than the level's height, so that the
    first size that is used weighs one half, whichever it is. Average pooling to ``k x k``.

    A warm-up is the framework's: ``weight: {start: 0.0, end: 5.0, over: 20}``. Published
    weights are 1 for ResNet-18 (8 for MobileNet) on ImageNet; on CIFAR-100 0.6 for resnet20, 1 for
    resnet32, 5 for resnet8x4 and WRN, 8 for ShuffleNetV2.

    Args:
        output_sizes: the sizes to pool to, each >= 1, from large to small.

    Shape:
        - student_features: maps (B, C, H, W) of ``ReviewFusion``, or pooled vectors (B, C), which
          are 1x1 maps; one, or a list.
        - teacher_features: of the same shapes.
        - returns: scalar, computed in float32 or wider. Only the student gets gradients.

    Raises:
        ValueError: a size below 1; maps of different shapes.

    Source: see ``ReviewFusion``.
    """

    def __init__(self, output_sizes: Sequence[int] = (4, 2, 1)) -> None:
        super().__init__()
        fits = all(size >= 1 for size in output_sizes)
        check(self, "output_sizes", output_sizes, fits, "a list of whole numbers >= 1")
        self.output_sizes = list(output_sizes)

    def layer_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of one level's maps."""
        student, teacher = _as_1x1_map(student), _as_1x1_map(teacher)
        check_same(self, student, teacher, "wire the teacher's features to `like` of ReviewFusion")
        difference = student - teacher
        loss, weight, total = difference.square().mean(), 1.0, 1.0
        for size in self.output_sizes:
            if size < student.shape[2]:
                weight /= 2
                total += weight
                # Pooling is linear: the difference of the pooled is the pooled difference.
                pooled = F.adaptive_avg_pool2d(difference, size)
                loss = loss + weight * pooled.square().mean()
        return loss / total
