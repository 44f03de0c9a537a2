"""torchvision's data sets by name, as the installed version has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torchvision import datasets

from distill_datasets_vision.missing_data import telling_what_is_missing

# Bases to derive from: the one has no items, the other wants a function that loads a file.
LEFT_OUT = frozenset({"VisionDataset", "DatasetFolder"})


def torchvision_datasets() -> dict[str, Callable[..., Any]]:
    """Return a factory for every concrete data set class of ``torchvision.datasets`` by its name.

    They read from the ``root`` they are given, download only where ``download`` is true, and say
    what is missing where there are no data.
    """
    found = {name: getattr(datasets, name) for name in datasets.__all__ if name not in LEFT_OUT}
    classes = {name: offered for name, offered in found.items() if inspect.isclass(offered)}
    return {name: _factory(offered) for name, offered in classes.items()}


def _factory(dataset: type[Any]) -> Callable[..., Any]:
    reads_files = "root" in inspect.signature(dataset).parameters
    return telling_what_is_missing(dataset) if reads_files else dataset
