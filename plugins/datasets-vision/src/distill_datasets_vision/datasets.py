"""torchvision's data sets by name, as the installed version has them."""

from __future__ import annotations

import inspect
from typing import Any

from torchvision import datasets

# Bases to derive from: the one has no items, the other wants a function that loads a file.
LEFT_OUT = frozenset({"VisionDataset", "DatasetFolder"})


def torchvision_datasets() -> dict[str, type[Any]]:
    """Return every concrete data set class of ``torchvision.datasets`` by its name.

    They read from the ``root`` they are given and do not download unless ``download`` says so
    (``SBU`` and ``SEMEION`` do by default).
    """
    found = {name: getattr(datasets, name) for name in datasets.__all__ if name not in LEFT_OUT}
    return {name: offered for name, offered in found.items() if inspect.isclass(offered)}
