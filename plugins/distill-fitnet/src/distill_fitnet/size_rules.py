"""How the sizes of maps change in a row of layers, and convolutions that change them so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

_SIZE = 64
_FAR = 96
"""A multiple of every usual stride, which moves the size of the output by _FAR / stride."""


class Rule(NamedTuple):
    """How an output's size follows from the input's: ``(size + offset) // stride``.

    Every row of convolutions and poolings follows one such rule, odd sizes included, since
    rounding down twice is rounding down once.
    """

    stride: int
    offset: int


class Step(NamedTuple):
    """One dimension of a convolution."""

    kernel: int
    stride: int
    padding: int


def measured(parts: Mapping[str, nn.Module], in_channels: int) -> tuple[int, tuple[Rule, Rule]]:
    """Return the output's channels, and the rules of height and width.

    Args:
        parts: layers that run in a row, by the names that a message shows.
        in_channels: of what the first one takes.

    Raises:
        ValueError: if they do not run in a row, or their output is no map or follows no rule.
    """
    with _evaluating(parts.values()), torch.no_grad():
        shapes = {n: _run(parts, in_channels, n) for n in (_SIZE, _SIZE + _FAR)}
        strides = [_stride(shapes, dimension) for dimension in (2, 3)]
        for size in range(_SIZE + 1, _SIZE + max(strides)):
            shapes[size] = _run(parts, in_channels, size)
    high, wide = (_rule(shapes, dimension, strides[dimension - 2]) for dimension in (2, 3))
    return shapes[_SIZE][1], (high, wide)


def _run(parts: Mapping[str, nn.Module], in_channels: int, size: int) -> torch.Size:
    device, dtype = placement(parts)
    given = features = torch.zeros(1, in_channels, size, size, device=device, dtype=dtype)
    for path, part in parts.items():
        try:
            features = part(features)
        except Exception as error:
            raise ValueError(
                f"bottlenecked: {path!r} does not run on what comes before it: {error}; replace "
                "must name modules that follow one another in the model, from its first on"
            ) from error
    if not isinstance(features, Tensor) or features.ndim != 4:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"bottlenecked: {path!r} must give maps (B, C, H, W) for images {tuple(given.shape)}, "
            f"but gave {got}"
        )
    return features.shape


def _stride(shapes: Mapping[int, torch.Size], dimension: int) -> int:
    gained = shapes[_SIZE + _FAR][dimension] - shapes[_SIZE][dimension]
    if gained < 1 or _FAR % gained:
        raise ValueError(_no_rule(shapes))
    return _FAR // gained


def _rule(shapes: Mapping[int, torch.Size], dimension: int, stride: int) -> Rule:
    # Among as many sizes as the stride one is not rounded at all, and shows the whole offset.
    offset = max(stride * shape[dimension] - size for size, shape in shapes.items())
    if any(shape[dimension] != (size + offset) // stride for size, shape in shapes.items()):
        raise ValueError(_no_rule(shapes))
    return Rule(stride, offset)


def _no_rule(shapes: Mapping[int, torch.Size]) -> str:
    seen = ", ".join(f"{size} -> {tuple(shape[2:])}" for size, shape in sorted(shapes.items()))
    return (
        "bottlenecked: the size of what the replaced modules give does not follow from a stride: "
        f"{seen}; leave out adaptive pooling and upsampling"
    )


def steps_of(stride: int, offset: int) -> list[Step]:
    """Return convolutions in a row that together follow the rule."""
    steps = []
    *early, last = _prime_factors(stride) or [1]
    for factor in early:
        offset, own = divmod(offset, factor)
        steps.append(step_of(factor, own))
    return [*steps, step_of(last, offset)]


def step_of(stride: int, offset: int) -> Step:
    """Return the smallest convolution of this rule that sees neighbours and leaves nothing out.

    A convolution makes ``(size + 2 padding - kernel) // stride + 1`` of a size.
    """
    least = max(3, stride)
    padding = max(0, (least - stride + offset + 1) // 2)
    return Step(stride + 2 * padding - offset, stride, padding)


def _prime_factors(number: int) -> list[int]:
    for factor in range(2, number + 1):
        if number % factor == 0:
            return [factor, *_prime_factors(number // factor)]
    return []


def placement(parts: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    """Return where the parameters of layers are, and their type."""
    for part in parts.values():
        for parameter in part.parameters():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


@contextmanager
def _evaluating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules, those inside them included, into evaluation mode for a while."""
    modes = {module: module.training for part in parts for module in part.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
