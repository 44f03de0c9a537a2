"""torchvision's transforms (v2) by name, as the installed version has them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import Transform  # type: ignore[attr-defined]
from torchvision.tv_tensors import TVTensor  # type: ignore[attr-defined]

LEFT_OUT = {
    "Transform": "a base to derive from",
    "Compose": "takes transforms; an experiment file lists them itself",
    "RandomApply": "takes transforms: see nested_transforms.py",
    "RandomChoice": "takes transforms: see nested_transforms.py",
    "RandomOrder": "takes transforms: see nested_transforms.py",
    "Lambda": "takes a function",
    "CutMix": "mixes the images and labels of a batch: a batch transform",
    "MixUp": "mixes the images and labels of a batch: a batch transform",
    "FiveCrop": "makes several images of one",
    "TenCrop": "makes several images of one",
}
"""Names of ``torchvision.transforms.v2`` that are not offered from there, and why."""

KINDS: dict[str, type] = {
    name: member
    for name, member in vars(tv_tensors).items()
    if inspect.isclass(member) and issubclass(member, TVTensor) and member is not TVTensor
} | {"Tensor": torch.Tensor}
"""What ``fill`` and ``dtype`` may name to have a value each, besides ``others``."""


@functools.cache
def torchvision_transforms() -> Mapping[str, Callable[..., Transform]]:
    """Return every v2 transform by its name that can be built from plain data.

    They turn one image (or clip) into one, or as joint transforms image and target into both. An
    image is a PIL image or a tensor (..., C, H, W); ``ToImage`` followed by
    ``ToDtype(dtype=float32, scale=true)`` makes of the first a tensor in [0, 1].
    """
    return {
        name: _with_kinds(offered) if _may_differ_by_kind(offered) else offered
        for name, offered in vars(v2).items()
        if inspect.isclass(offered)
        and issubclass(offered, Transform)
        and not name.startswith("_")
        and name not in LEFT_OUT
    }


def _may_differ_by_kind(transform: type[Transform]) -> bool:
    return not {"fill", "dtype"}.isdisjoint(inspect.signature(transform).parameters)


def _with_kinds(transform: type[Transform]) -> Callable[..., Transform]:
    """Return a factory whose ``fill`` and ``dtype`` may be mappings that name kinds of tensors."""

    @functools.wraps(transform, updated=())
    def build(*args: Any, **params: Any) -> Transform:
        for name in {"fill", "dtype"} & params.keys():
            if isinstance(params[name], Mapping):
                params[name] = _by_kind(name, params[name])
        return transform(*args, **params)

    return build


def _by_kind(parameter: str, values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Turn ``{Mask: 255, others: 0}`` into what torchvision takes.

    Raises:
        ValueError: if there is no such kind or type.
    """
    unknown = [k for k in values if isinstance(k, str) and k not in KINDS and k != "others"]
    if unknown:
        raise ValueError(f"{parameter} names '{unknown[0]}': known are {', '.join(KINDS)}, others")
    convert = _dtype if parameter == "dtype" else lambda value: value
    return {KINDS.get(kind, kind): convert(value) for kind, value in values.items()}


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if value is None or isinstance(value, torch.dtype):
        return value
    raise ValueError(f"dtype has the value {value!r}: known are float32, uint8, int64, ... or null")
