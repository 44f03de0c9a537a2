"""Auxiliary modules of one layer for each feature, built to fit the shapes that they meet."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from distill.parameters import Parametrized
from distill_fitnet.feature_pairs import Features, as_list
from distill_fitnet.feature_shapes import Channels, channel_list, check_form

_Shape = TypeVar("_Shape")


class FittedLayers(Parametrized):
    """A layer for each of the student's features, from its channels to the teacher's.

    The layers are built at once where all channels are given, else by ``setup``. A subclass says
    how: ``layer`` makes one, ``prepare`` brings a feature to the form that the layer takes, with
    the channels in dimension 1.

    Args:
        in_channels: channels of the student's features: a number, or a list with one for each
            layer; ``None`` takes them from the features that ``setup`` gets.
        out_channels: channels to give back, likewise; ``None`` takes them from ``like``.
    """

    dimensions: ClassVar[tuple[int, ...]] = (4,)
    """How many dimensions a feature may have; see ``feature_shapes.FORMS``."""
    one_layer: ClassVar[bool] = False
    """Whether features are one tensor and no list."""

    def __init__(self, in_channels: Channels = None, out_channels: Channels = None) -> None:
        super().__init__()
        self.in_channels = channel_list(self, "in_channels", in_channels)
        self.out_channels = channel_list(self, "out_channels", out_channels)
        self.layers = nn.ModuleList()

    def layer(self, in_channels: int, out_channels: int) -> nn.Module:
        """Build the layer for one feature."""
        raise NotImplementedError

    def prepare(self, features: Tensor) -> Tensor:
        """Bring a feature, of the student or of the teacher, to the form that a layer takes."""
        check_form(self, features, *self.dimensions)
        return features

    def listed(self, features: Features) -> list[Tensor]:
        """Return features as a list; refuse one where they must be one tensor."""
        if self.one_layer and not isinstance(features, Tensor):
            raise ValueError(
                f"{type(self).__name__}: features must be of one layer, got a list; give each "
                "layer a module of its own"
            )
        return as_list(features)

    def setup(self, features: Features, like: Features | None = None) -> None:
        """Build the layers for these features, or check that those already built fit them.

        Args:
            features: as ``forward`` takes them.
            like: the teacher's features; only their shapes are used. Needed unless
                ``out_channels`` was given.

        Raises:
            ValueError: if shapes and channels do not fit each other, or ``like`` is missing.
        """
        given = self.listed(features)
        self.in_channels = self._fitting("in_channels", self.in_channels, given)
        if like is not None:
            self.out_channels = self._fitting("out_channels", self.out_channels, self.listed(like))
        if self.out_channels is None:
            raise ValueError(
                f"{type(self).__name__}: give out_channels, or wire the teacher's features to "
                "`like`, whose shape says what to build"
            )
        if not self.layers:
            self.build_if_known()
        for layer, feature in zip(self.layers, given, strict=True):
            layer.to(feature.device, torch.promote_types(feature.dtype, torch.float32))

    def build_if_known(self) -> None:
        """Build the layers, if all channels are known; a subclass calls this when it is ready."""
        if self.in_channels is None or self.out_channels is None:
            return
        if len(self.in_channels) != len(self.out_channels):
            raise ValueError(
                f"{type(self).__name__}: in_channels {self.in_channels} and out_channels "
                f"{self.out_channels} must have one number for each layer"
            )
        pairs = zip(self.in_channels, self.out_channels, strict=True)
        self.layers.extend(self.layer(*pair) for pair in pairs)

    def forward(self, features: Features, like: Features | None = None) -> Features:
        """Apply each layer to its feature.

        Args:
            features: the student's: a tensor, or a list with one for each layer.
            like: the teacher's; see ``setup``.

        Returns:
            A tensor for a tensor, a list for a list.
        """
        given = self.listed(features)
        check_built(self, self.layers, len(given))
        likes = [None] * len(given) if like is None else as_list(like)
        outputs = [
            self.apply_layer(layer, feature, target)
            for layer, feature, target in zip(self.layers, given, likes, strict=True)
        ]
        return outputs[0] if isinstance(features, Tensor) else outputs

    def apply_layer(self, layer: nn.Module, features: Tensor, like: Tensor | None) -> Tensor:
        """Apply one layer to one feature, in the type of the layer's parameters."""
        own = next(layer.parameters())
        output: Tensor = layer(self.prepare(features).to(own.dtype))
        return output

    def _fitting(self, name: str, known: list[int] | None, features: list[Tensor]) -> list[int]:
        found = [self.prepare(feature).shape[1] for feature in features]
        return settled(self, name, known, found, features)


def settled(
    owner: object, name: str, known: _Shape | None, found: _Shape, features: Sequence[Tensor]
) -> _Shape:
    """Return a part of a shape as it is found on features.

    Raises:
        ValueError: if it was known already, and to be another one.
    """
    if known is not None and known != found:
        shapes = ", ".join(str(tuple(feature.shape)) for feature in features)
        raise ValueError(
            f"{type(owner).__name__}: {name} is {known}, but features of shape {shapes} have "
            f"{found}"
        )
    return found


def check_built(owner: object, parts: Sized, number: int, what: str = "layers") -> None:
    """Refuse to work without parts, or with parts for another number of features.

    Raises:
        RuntimeError: if none are built yet.
        ValueError: if there is not one for each feature.
    """
    kind = type(owner).__name__
    if not parts:
        raise RuntimeError(
            f"{kind} has no {what} yet: call setup with features, or give all shapes to the "
            "constructor"
        )
    if len(parts) != number:
        raise ValueError(f"{kind}: built for {len(parts)} features, got {number}")
