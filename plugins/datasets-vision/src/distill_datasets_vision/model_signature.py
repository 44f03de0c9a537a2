"""Which parameters a torchvision model has: its builder's own and those of the model class.

The builders end in ``**kwargs``, which some models swallow without a word. Put together from both,
a signature tells what may stand in a file, and a misspelt name is noticed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn
from torchvision.models import WeightsEnum  # type: ignore[attr-defined]

WEIGHTS = frozenset({"weights", "weights_backbone"})

# A builder passes these itself, or ignores them; giving them once more would be an error or a lie.
_TAKEN = {
    "DenseNet": {"growth_rate", "block_config", "num_init_features"},
    "EfficientNet": {"last_channel"},
    "LRASPP": {"inter_channels"},
    "SqueezeNet": {"version"},
    "SwinTransformer": {"stochastic_depth_prob"},
    "SwinTransformer3d": {"stochastic_depth_prob"},
}
# A builder takes these out of its **kwargs, where no signature shows them.
_ADDED: dict[str, dict[str, Any]] = {
    "EfficientNet": {"dropout": float},
    "MaxVit": {"input_size": tuple[int, int]},
    "MobileNetV3": {"width_mult": float, "reduced_tail": bool, "dilated": bool},
    "VisionTransformer": {"image_size": int},
}
# Without a hint and with None as default, these are numbers; all others of that kind are modules.
_NUMBERS = frozenset({"bbox_reg_weights", "image_mean", "image_std", "min_size"})

_PLAIN = (int, float, bool, str, types.NoneType, Any, Ellipsis)


def model_signature(builder: Callable[..., nn.Module]) -> inspect.Signature:
    """Return the signature of a builder, the model class's parameters in place of ``**kwargs``.

    All parameters are keyword-only. Weights are hinted by the names they have. A default of ``...``
    stands for the architecture's own. What a file cannot hold (modules, functions) is left out.
    """
    hints = get_type_hints(builder)
    parameters = {p.name: p for p in _of_builder(builder, hints)}
    model = hints.get("return")
    if inspect.isclass(model):
        for name, hint in _of_model(model):
            parameters.setdefault(name, _keyword(name, ..., hint))
    return inspect.Signature(list(parameters.values()), return_annotation=model or nn.Module)


def weight_enums(builder: Callable[..., nn.Module], parameter: str) -> list[type[WeightsEnum]]:
    """Return the kinds of weights that a builder's ``weights`` or ``weights_backbone`` may be."""
    hint = get_type_hints(builder)[parameter]
    return [cls for cls in get_args(hint) if inspect.isclass(cls) and issubclass(cls, WeightsEnum)]


def _of_builder(
    builder: Callable[..., nn.Module], hints: dict[str, Any]
) -> Iterator[inspect.Parameter]:
    for name, parameter in inspect.signature(builder).parameters.items():
        hint = hints.get(name, parameter.annotation)
        if name in WEIGHTS:
            yield _keyword(name, None, _names_of_weights(weight_enums(builder, name)))
        elif parameter.kind is not parameter.VAR_KEYWORD and _is_plain(hint):
            yield _keyword(name, parameter.default, hint)


def _of_model(model: type) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a model class, by name and hint, that a builder hands on."""
    owner = next(cls for cls in model.__mro__ if _names_parameters(cls))
    init = vars(owner)["__init__"]
    family = {cls.__name__ for cls in model.__mro__}
    taken = {name for cls in family & _TAKEN.keys() for name in _TAKEN[cls]}
    hints = get_type_hints(init)
    for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
        hint = hints.get(name, parameter.annotation)
        if name not in taken and _has_default(parameter) and _is_offered(parameter, hint):
            yield name, hint
    for cls in family & _ADDED.keys():
        yield from _ADDED[cls].items()
    if owner is not model and owner.__module__ != model.__module__:  # the quantizable models
        yield "backend", str


def _names_parameters(cls: type) -> bool:
    if "__init__" not in vars(cls):
        return False
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    return not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty


def _is_offered(parameter: inspect.Parameter, hint: Any) -> bool:
    if hint is parameter.empty and parameter.default is None:
        return parameter.name in _NUMBERS
    return _is_plain(hint)


def _is_plain(hint: Any) -> bool:
    """Say whether a file can hold a value of this hint: text, numbers, lists and mappings."""
    if hint is inspect.Parameter.empty or hint in _PLAIN:
        return True
    origin = get_origin(hint)
    if origin in (list, tuple, dict, Sequence, Union, types.UnionType):
        return all(map(_is_plain, get_args(hint)))
    return origin is Literal


def _names_of_weights(enums: Sequence[type[WeightsEnum]]) -> Any:
    """Return a Literal of the names of these weights, or ``None``."""
    names = tuple(dict.fromkeys(name for cls in enums for name in cls.__members__))
    return Literal[names] | None if names else None


def _keyword(name: str, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
