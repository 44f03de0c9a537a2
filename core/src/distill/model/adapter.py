"""The smallest module that brings one feature to the shape of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.model.wiring import describe

VECTORS, TOKENS, MAPS = 2, 3, 4
"""Dimensions of (B, D), (B, N, D) and (B, C, H, W)."""


class Adapter(nn.Module):
    """Brings features to the shapes of others: maps, tokens and vectors.

    Channels meet by a 1x1 convolution or a linear layer, heights and widths by average pooling or
    bilinear interpolation. Tokens that fill a square, behind class tokens if there are any, can
    become a map and back. Maps become vectors by their mean over positions. What shrinks a feature
    goes before what widens it.

    Shapes: ``features`` and ``like``, a tensor or a list of tensors each; returns ``features`` in
    the shapes of ``like``, of which nothing else is used.

    Attributes:
        chosen: for each feature, what is done to it, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.chosen: list[str] = []

    def setup(self, features: Tensor | Sequence[Tensor], like: Tensor | Sequence[Tensor]) -> None:
        """Choose and build the layers.

        Raises:
            ValueError: if no module can make the shapes meet.
        """
        sources, goals = _as_list(features), _as_list(like)
        if len(sources) != len(goals):
            raise ValueError(f"{len(sources)} features cannot meet {len(goals)} others")
        for source, goal in zip(sources, goals, strict=True):
            part = _Adaptation(source, goal)
            self.parts.append(part.to(source.device))
            self.chosen.append(part.chosen)

    def forward(
        self, features: Tensor | Sequence[Tensor], like: Tensor | Sequence[Tensor]
    ) -> Tensor | list[Tensor]:
        """Return the features in the shapes of ``like``."""
        sources, goals = _as_list(features), _as_list(like)
        pairs = zip(self.parts, sources, goals, strict=True)
        adapted = [part(source, goal) for part, source, goal in pairs]
        return adapted[0] if isinstance(features, Tensor) else adapted


class _Adaptation(nn.Module):
    """Brings one feature to the shape of one other."""

    def __init__(self, source: Tensor, goal: Tensor):
        super().__init__()
        _check(source, goal)
        changed = _in_form_of(source, goal)
        channels = [_channels(changed), _channels(goal)]
        self.layer: nn.Module = nn.Identity()
        words = [_FORMS[source.dim(), goal.dim()]] if source.dim() != goal.dim() else []
        words += ["average pooling"] if _sizes(_shrunk(changed, goal)) != _sizes(changed) else []
        if channels[0] != channels[1]:
            kind = "1x1 convolution" if goal.dim() == MAPS else "linear layer"
            self.layer = _channel_layer(*channels, is_map=goal.dim() == MAPS)
            words.append(f"{kind} {channels[0]} -> {channels[1]}")
        words += ["interpolation"] if _is_smaller(changed, goal) else []
        self.chosen = ", ".join(words) or "nothing"

    def forward(self, source: Tensor, goal: Tensor) -> Tensor:
        adapted: Tensor = self.layer(_shrunk(_in_form_of(source, goal), goal))
        return _widened(adapted, goal)


def _channel_layer(inputs: int, outputs: int, *, is_map: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1) if is_map else nn.Linear(inputs, outputs)


_FORMS = {
    (MAPS, VECTORS): "mean over positions",
    (TOKENS, VECTORS): "mean over tokens",
    (TOKENS, MAPS): "tokens to map",
    (MAPS, TOKENS): "map to tokens",
}


def _check(source: Tensor, goal: Tensor) -> None:
    """Refuse shapes that no module makes meet."""
    forms = (source.dim(), goal.dim())
    fits = forms in _FORMS or (forms[0] == forms[1] and VECTORS <= forms[0] <= MAPS)
    if fits and forms == (TOKENS, MAPS):
        fits = _grid(source) is not None
    if fits and forms == (MAPS, TOKENS):
        grid = _grid(goal)
        fits = source.shape[2] == source.shape[3] and grid is not None and grid[0] == 0
    if fits and forms == (TOKENS, TOKENS) and source.shape[1] != goal.shape[1]:
        grids = _grid(source), _grid(goal)
        fits = grids[0] is not None and grids[1] is not None and grids[0][0] >= grids[1][0]
    if not fits:
        raise ValueError(
            f"no adapter makes {describe(source)} meet {describe(goal)}; it knows vectors (B, D), "
            "maps (B, C, H, W), and tokens (B, N, D) that fill a square; write an auxiliary module"
        )


def _in_form_of(source: Tensor, goal: Tensor) -> Tensor:
    """Turn maps, tokens and vectors into each other, channels and sizes as they are."""
    forms = (source.dim(), goal.dim())
    if forms == (MAPS, VECTORS):
        return source.mean((2, 3))
    if forms == (TOKENS, VECTORS):
        return source.mean(1)
    if forms == (TOKENS, MAPS):
        return _tokens_to_map(source)
    if forms == (MAPS, TOKENS):
        return _map_to_tokens(source)
    if forms == (TOKENS, TOKENS) and source.shape[1] != goal.shape[1]:
        surplus = _class_tokens(source) - _class_tokens(goal)
        return source[:, surplus:]
    return source


def _shrunk(source: Tensor, goal: Tensor) -> Tensor:
    """Pool to the height and width of ``goal`` where those are smaller."""
    sizes = tuple(map(min, _sizes(source), _sizes(goal)))
    return _resized(source, goal, sizes, _pooled)


def _widened(source: Tensor, goal: Tensor) -> Tensor:
    """Interpolate to the height and width of ``goal``."""
    return _resized(source, goal, _sizes(goal), _interpolated)


def _pooled(source: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return F.adaptive_avg_pool2d(source, (sizes[0], sizes[1]))


def _interpolated(source: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return F.interpolate(source, sizes, mode="bilinear", align_corners=False)


def _resized(
    source: Tensor,
    goal: Tensor,
    sizes: tuple[int, ...],
    resize: Callable[[Tensor, tuple[int, ...]], Tensor],
) -> Tensor:
    if sizes == _sizes(source):
        return source
    if goal.dim() == MAPS:
        return resize(source, sizes)
    kept = _class_tokens(source)
    tokens = _map_to_tokens(resize(_tokens_to_map(source), sizes))
    return torch.cat([source[:, :kept], tokens], dim=1)


def _is_smaller(source: Tensor, goal: Tensor) -> bool:
    return any(s < g for s, g in zip(_sizes(source), _sizes(goal), strict=True))


def _sizes(features: Tensor) -> tuple[int, ...]:
    """Return height and width, of tokens those of the square that they fill."""
    if features.dim() == MAPS:
        return tuple(features.shape[2:])
    grid = _grid(features) if features.dim() == TOKENS else None
    return () if grid is None else (grid[1], grid[1])


def _channels(features: Tensor) -> int:
    return features.shape[1 if features.dim() == MAPS else -1]


def _grid(tokens: Tensor) -> tuple[int, int] | None:
    """Return the number of class tokens and the side of the square behind them."""
    for classes in (0, 1, 2):
        side = math.isqrt(max(tokens.shape[1] - classes, 0))
        if side > 0 and side**2 + classes == tokens.shape[1]:
            return classes, side
    return None


def _class_tokens(tokens: Tensor) -> int:
    grid = _grid(tokens)
    return 0 if grid is None else grid[0]


def _tokens_to_map(tokens: Tensor) -> Tensor:
    patches = tokens[:, _class_tokens(tokens) :].transpose(1, 2)
    side = math.isqrt(patches.shape[2])
    return patches.reshape(*patches.shape[:2], side, side)


def _map_to_tokens(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


def _as_list(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)
