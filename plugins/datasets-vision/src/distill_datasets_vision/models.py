"""torchvision's models by name, as the installed version has them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torchvision.models import (  # type: ignore[attr-defined]
    WeightsEnum,
    get_model_builder,
    list_models,
)

from distill_datasets_vision.model_architecture import architecture_only
from distill_datasets_vision.model_signature import WEIGHTS, model_signature, weight_enums

Builder = Callable[..., nn.Module]


def torchvision_models() -> dict[str, Builder]:
    """Return a factory for every model that torchvision registers, by its name."""
    return {name: model_factory(name) for name in list_models()}


def model_factory(name: str) -> Builder:
    """Return the factory of the torchvision model ``name``.

    It takes keyword arguments only and has the signature that ``model_signature`` describes.
    Pretrained weights are named by text (``IMAGENET1K_V1``, ``DEFAULT``) and downloaded only where
    they are asked for, never on the meta device; ``weights_backbone`` is ``None`` unless given,
    other than in torchvision.

    The factory raises TypeError for a parameter that the model does not have, and ValueError for
    weights that it does not have.
    """
    return _Factory(name)


class _Factory:
    """See ``model_factory``. The signature is put together when it is first looked at."""

    def __init__(self, name: str) -> None:
        self._builder = get_model_builder(name)
        self.__name__ = self.__qualname__ = name
        self.__doc__ = inspect.getdoc(self._builder)

    @cached_property
    def __signature__(self) -> inspect.Signature:
        return model_signature(self._builder)

    def __call__(self, **params: Any) -> nn.Module:
        name, signature = self.__name__, self.__signature__
        _refuse_unknown(name, params, signature)
        for key in WEIGHTS & signature.parameters.keys():
            params[key] = _find_weights(name, key, params)
        with _surroundings(name, params):
            return self._builder(**params)


def _surroundings(name: str, params: Mapping[str, Any]) -> AbstractContextManager[Any]:
    if torch.get_default_device().type != "meta":
        return nullcontext()
    return architecture_only(name, quantize=bool(params.get("quantize", False)))


def _refuse_unknown(name: str, params: Mapping[str, Any], signature: inspect.Signature) -> None:
    known = list(signature.parameters)
    for key in params:
        if key not in known:
            near = difflib.get_close_matches(key, known)
            hint = (
                f"; did you mean {' or '.join(near)}?" if near else f" (known: {', '.join(known)})"
            )
            raise TypeError(f"{name} has no parameter '{key}'{hint}")


def _find_weights(model: str, key: str, params: Mapping[str, Any]) -> WeightsEnum | None:
    """Return the weights that ``params[key]`` names, or ``None`` where it names none."""
    asked = params.get(key)
    if asked is None or isinstance(asked, WeightsEnum):
        return asked
    # A quantizable model has weights of two kinds, and `quantize` says which of them fit.
    quantize = bool(params.get("quantize", False))
    known = {
        name: weights
        for kind in weight_enums(get_model_builder(model), key)
        if kind.__name__.endswith("_QuantizedWeights") is quantize
        for name, weights in kind.__members__.items()
    }
    if asked not in known:
        available = ", ".join(known) or "none are available"
        raise ValueError(f"{model} has no {key} '{asked}': {available}")
    return known[asked]
