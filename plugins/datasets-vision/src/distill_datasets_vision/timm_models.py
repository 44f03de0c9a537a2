"""Any model of timm (PyTorch Image Models), where that package is installed."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn


def timm(
    model: str,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_rate: float | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Return the timm model ``model``: images (B, in_chans, H, W) to logits (B, num_classes).

    Pretrained weights are downloaded only where they are asked for, never on the meta device. What
    is ``None`` is left to the model.

    Args:
        model: a name of ``timm.list_models()``, also with the tag of weights: ``resnet18.a1_in1k``.
        pretrained: load the weights that the tag names, or those of the model's first tag. A
            classifier with another number of classes starts anew.
        num_classes: number of logits.
        in_chans: channels of an image.
        drop_rate: probability of dropping a value before the classifier.
        options: further arguments of the model, as ``timm.create_model`` hands them on:
            ``{img_size: 32, drop_path_rate: 0.1}``.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if timm has no such model or tag, or an option is no argument of a model.
        TypeError: if the model does not take an argument.
    """
    library = _library()
    _check_name(library, model)
    options = dict(options or {})
    _check_options(library, options)
    on_meta = torch.get_default_device().type == "meta"
    built: nn.Module = library.create_model(
        model,
        pretrained=pretrained and not on_meta,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        **options,
    )
    return built


def _library() -> ModuleType:
    # Not at the top: importing timm takes seconds, which only those who use it should wait.
    if importlib.util.find_spec("timm") is None:
        raise ModuleNotFoundError("the package timm is not installed: pip install timm")
    return importlib.import_module("timm")


def _check_name(library: ModuleType, name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not library.is_model(architecture):
        near = difflib.get_close_matches(architecture, library.list_models())
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm {library.__version__} has no model '{architecture}'{hint}")
    tags = [known.partition(".")[2] for known in library.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        available = ", ".join(tags) or "none are available"
        raise ValueError(f"{architecture} has no weights '{tag}': {available}")


def _check_options(library: ModuleType, options: Mapping[str, Any]) -> None:
    """Refuse what is no argument of a model: weights of other places, export settings."""
    taken = {
        *inspect.signature(library.create_model).parameters,
        *inspect.signature(timm).parameters,
    }
    for key in options:
        if key in taken:
            raise ValueError(f"'{key}' is no option of a timm model")
