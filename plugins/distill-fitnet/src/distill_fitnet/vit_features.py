"""ViTKD: a vision transformer's shallow layers mimicked, its last layer generated.

The first two blocks and the tokens after the last norm are captured, as published; the names are
those of torchvision's ``vit_*`` (timm: ``blocks.0``, ``blocks.1``, ``norm``):

.. code-block:: yaml

    auxiliary:
      mimic:
        type: ViTKDMimic
        inputs:
          features: [student.encoder.layers.encoder_layer_0, student.encoder.layers.encoder_layer_1]
          like: [teacher.encoder.layers.encoder_layer_0, teacher.encoder.layers.encoder_layer_1]
      generator:
        type: ViTKDGenerator
        inputs: {features: student.encoder.ln, like: teacher.encoder.ln}
    criterion:
      vitkd:
        type: ViTKDLoss
        inputs:
          student_low: mimic
          teacher_low:
            [teacher.encoder.layers.encoder_layer_0, teacher.encoder.layers.encoder_layer_1]
          student_high: generator.tokens
          teacher_high: teacher.encoder.ln
          mask: generator.mask

Sequences begin with tokens that are no patches, and these take no part: one class token in
torchvision's and timm's models, two in timm's distilled DeiT, none in models that pool. Each of
the three is told by ``class_tokens``: mimic and generator of the student's, the loss of the
teacher's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distill.parameters import Parametrized, check
from distill_fitnet.feature_pairs import Features, feature_pairs, sum_over_layers
from distill_fitnet.feature_shapes import Channels, check_same
from distill_fitnet.fitted_layers import FittedLayers
from distill_fitnet.masked_generation import conv_generator


class _FittedTokens(FittedLayers):
    """Layers over the patches' tokens of sequences (B, class_tokens + N, D)."""

    dimensions = (3,)

    def __init__(self, class_tokens: int, in_channels: Channels, out_channels: Channels) -> None:
        super().__init__(in_channels, out_channels)
        _check_class_tokens(self, class_tokens)
        self.class_tokens = class_tokens

    def prepare(self, features: Tensor) -> Tensor:
        """Return the patches' tokens as (B, D, N): the base looks for channels in dimension 1."""
        return super().prepare(features)[:, self.class_tokens :].transpose(1, 2)

    def patches(self, features: Tensor) -> Tensor:
        """Return the patches' tokens (B, N, D)."""
        return self.prepare(features).transpose(1, 2)


class ViTKDMimic(_FittedTokens):
    """Takes the student's tokens of shallow layers to the teacher's width, one Linear a layer.

    Where the widths of a layer are equal, its tokens pass as they are.

    Args:
        class_tokens: how many leading tokens of the student's sequences are no patches, >= 0.
        in_channels: the student's widths, one for each layer; ``None`` takes them from
            ``features``.
        out_channels: the teacher's; ``None`` takes them from ``like``.

    Shape:
        - features: tokens (B, class_tokens + N, D_s), one or a list.
        - like: the teacher's, of which only the shapes are used.
        - returns: tokens (B, N, D_t) of the patches, a list for a list.

    Raises:
        ValueError: class_tokens out of range; widths that do not fit or are not known.
        RuntimeError: if called before its layers are built.

    Source: see ``ViTKDLoss``.
    """

    def __init__(
        self,
        class_tokens: int = 1,
        in_channels: list[int] | int | None = None,
        out_channels: list[int] | int | None = None,
    ) -> None:
        super().__init__(class_tokens, in_channels, out_channels)
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build what one layer's tokens go through."""
        return _projection(in_channels, out_channels)

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Return one layer's tokens in the teacher's width."""
        tokens = self.patches(features)
        if isinstance(layer, nn.Linear):
            tokens = tokens.to(layer.weight.dtype)
        projected: Tensor = layer(tokens)
        return projected


class ViTKDGenerator(_FittedTokens):
    r"""Replaces a random part of the student's last tokens and generates the teacher's from them.

    .. math::
        out = conv_{3 \times 3}(ReLU(conv_{3 \times 3}(masked(Linear(s)))))

    In training mode each call masks, for every sample, all but ``int(N (1 - masking))`` of its N
    tokens: a learned token, zero at first, takes their place. The tokens, row by row, make a square
    map for the convolutions. The Linear is there where the widths differ.

    In evaluation mode nothing is replaced, and the mask says so, which makes the generated part of
    ``ViTKDLoss`` 0.

    Args:
        masking: the part that is replaced, within (0, 1); ``ViTKDLoss`` must be given the same.
        class_tokens: how many leading tokens of the student's sequence are no patches, >= 0.
        in_channels: the student's width; ``None`` takes it from ``features``.
        out_channels: the teacher's; ``None`` takes it from ``like``.

    Shape:
        - features: tokens (B, class_tokens + N, D_s), N a square number.
        - like: the teacher's, of which only the shape is used.
        - noise: draws (B, N) to mask by: the tokens with the smallest ones stay; drawn if ``None``.
        - returns: ``tokens`` (B, N, D_t) and ``mask`` (B, N), true where a token was replaced.

    Raises:
        ValueError: a parameter out of range; widths that do not fit or are not known; a number
            of tokens that is no square; noise of another shape.
        RuntimeError: if called before its layers are built.

    Source: see ``ViTKDLoss``.
    """

    one_layer = True  # a loss takes what is generated for one

    def __init__(
        self,
        masking: float = 0.5,
        class_tokens: int = 1,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__(class_tokens, in_channels, out_channels)
        check(self, "masking", masking, 0 < masking < 1, "within (0, 1)")
        self.masking = masking
        self.build_if_known()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build projection, mask token and generator."""
        return _TokenGenerator(in_channels, out_channels)

    def setup(
        self, features: Features, like: Features | None = None, noise: Features | None = None
    ) -> None:
        """Build the layers for these features, or check that those already built fit them."""
        super().setup(features, like)

    # The parts have names, since the loss takes them apart.
    def forward(  # type: ignore[override]
        self, features: Tensor, like: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the generated tokens and where the student's were replaced."""
        # What the base applies is the projection.
        tokens = super().forward(features, like)
        assert isinstance(tokens, Tensor), "a tensor comes back for a tensor"
        generator = self.layers[0]
        assert isinstance(generator, _TokenGenerator)
        mask = self._mask(tokens, noise)
        tokens = torch.where(mask.unsqueeze(2), generator.mask_token.to(tokens.dtype), tokens)
        side = self._side(tokens)
        generated = generator.generation(tokens.transpose(1, 2).unflatten(2, (side, side)))
        return {"tokens": generated.flatten(2).transpose(1, 2), "mask": mask}

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Return the student's tokens in the teacher's width."""
        assert isinstance(layer, _TokenGenerator)
        projected: Tensor = layer.align(self.patches(features).to(layer.mask_token.dtype))
        return projected

    def _mask(self, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """Return which tokens (B, N) are replaced."""
        shape = tokens.shape[:2]
        if not self.training:
            return torch.zeros(shape, dtype=torch.bool, device=tokens.device)
        if noise is None:
            noise = torch.rand(shape, device=tokens.device)
        if noise.shape != shape:
            raise ValueError(
                f"ViTKDGenerator: noise for tokens {tuple(tokens.shape)} must have the shape "
                f"{tuple(shape)}, got {tuple(noise.shape)}"
            )
        kept = int(shape[1] * (1 - self.masking))
        ranks = noise.argsort(1).argsort(1)
        return ranks >= kept

    def _side(self, tokens: Tensor) -> int:
        """Return the side of the square map that the tokens make."""
        number = tokens.shape[1]
        side = math.isqrt(number)
        if side**2 != number:
            raise ValueError(
                f"ViTKDGenerator: {number} tokens {tuple(tokens.shape)} make no square map; "
                f"class_tokens is {self.class_tokens}: how many leading tokens are no patches?"
            )
        return side


class _TokenGenerator(nn.Module):
    """The layers of ``ViTKDGenerator``, which applies them with a mask in between."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.align = _projection(in_channels, out_channels)
        self.mask_token = nn.Parameter(torch.zeros(out_channels))
        self.generation = conv_generator(out_channels)


class ViTKDLoss(Parametrized):
    r"""Squared distance of mimicked shallow tokens, and of generated ones where they were masked.

    .. math::
        L = \frac{\alpha}{B} \sum_l \| s_l - t_l \|^2
            + \frac{\beta}{masking \, B} \| M \odot (g - t_L) \|^2

    Sums are over samples, tokens and channels, so ``alpha`` and ``beta`` belong to certain shapes.

    Args:
        alpha: weight of the mimicked layers, >= 0.
        beta: weight of the generated one, >= 0.
        masking: the part of tokens that ``ViTKDGenerator`` replaces, within (0, 1].
        class_tokens: how many leading tokens of the teacher's sequences are no patches, >= 0. The
            student's are without them already.

    Shape:
        - student_low: what ``ViTKDMimic`` gives, tokens (B, N, D), one or a list.
        - teacher_low: the teacher's, (B, class_tokens + N, D), as many.
        - student_high, mask: ``tokens`` (B, N, D) and ``mask`` (B, N) of ``ViTKDGenerator``.
        - teacher_high: tokens (B, class_tokens + N, D) of the teacher's last layer.
        - returns: scalar, computed in float32 or wider. Only the student gets gradients.

    Raises:
        ValueError: a parameter out of range; tokens of different shapes.

    Source: Yang, Li, Zeng, Li, Yuan, Li, *ViTKD: Practical Guidelines for ViT feature knowledge
    distillation*, 2022, https://arxiv.org/abs/2209.02432; code: github.com/yzd-v/cls_KD, which
    takes the outputs of the first two blocks, and those of the last one after the final norm.
    DeiT-Tiny from DeiT III-Small on ImageNet: 76.06, together with NKD 77.78.
    """

    def __init__(
        self,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        masking: float = 0.5,
        class_tokens: int = 1,
    ) -> None:
        super().__init__()
        check(self, "alpha", alpha, 0 <= alpha < math.inf, "a finite number >= 0")
        check(self, "beta", beta, 0 <= beta < math.inf, "a finite number >= 0")
        check(self, "masking", masking, 0 < masking <= 1, "within (0, 1]")
        _check_class_tokens(self, class_tokens)
        self.alpha = alpha
        self.beta = beta
        self.masking = masking
        self.class_tokens = class_tokens

    def forward(
        self,
        student_low: Features,
        teacher_low: Features,
        student_high: Tensor,
        teacher_high: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        differences = [self._difference(*pair) for pair in feature_pairs(student_low, teacher_low)]
        mimicked = sum_over_layers(self, [difference.square().sum() for difference in differences])
        [high] = [self._difference(*pair) for pair in feature_pairs(student_high, teacher_high)]
        if mask.shape != high.shape[:2]:
            raise ValueError(
                f"ViTKDLoss: mask {tuple(mask.shape)} does not fit tokens {tuple(high.shape)}"
            )
        generated = (high * mask.to(high.dtype).unsqueeze(2)).square().sum()
        return (self.alpha * mimicked + self.beta / self.masking * generated) / len(high)

    def _difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher[:, self.class_tokens :]
        advice = (
            f"class_tokens is {self.class_tokens}: how many of the teacher's leading tokens are no "
            "patches? ViTKDMimic and ViTKDGenerator take the student's to the teacher's width"
        )
        check_same(self, student, teacher, advice)
        return student - teacher


def _check_class_tokens(owner: object, number: int) -> None:
    check(owner, "class_tokens", number, number >= 0, "a whole number >= 0")


def _projection(in_channels: int, out_channels: int) -> nn.Module:
    """Return a Linear where the widths differ."""
    return nn.Identity() if in_channels == out_channels else nn.Linear(in_channels, out_channels)
