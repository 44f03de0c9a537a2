"""Every image four times, each turned by another quarter: what SSKD's losses compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.data import Dataset

from distill import Sample, Views, plugins

Components = Sequence[str | Mapping[str, Any]]
"""``{type: RandomCrop, params: {size: 32}}`` each, or a bare name."""

QUARTERS = (0, 1, 2, 3)


class Rotations(Dataset[Sample]):
    """A data set whose images come as they are and turned by 90, 180 and 270 degrees.

    Counter-clockwise, in this order, as ``Views``: the file's ``transforms`` are applied to each of
    the four by itself, so that each draws its own crop and flip (torchdistill's way). What is to be
    drawn once for all four, before they are turned, goes into ``shared`` (the authors' way: flips
    there, crops in the file's ``transforms``)::

        wrappers: [{type: Rotations, params: {shared: [RandomHorizontalFlip]}}]
        transforms: [{type: RandomCrop, params: {size: 32, padding: 4}}, ...]

    A batch of B samples then has 4B inputs and B targets. Images that are not square swap height
    and width with every other turn, so they need a transform that gives all the same size, such as
    ``RandomResizedCrop``; without one, they cannot be put into a batch.

    Args:
        dataset: items are ``(input, target)`` or ``Sample``; inputs are PIL images or tensors
            (..., H, W), tv_tensors included.
        shared: transforms by name, of any plugin, applied in order. Their parameters are passed on
            as they stand in the file: numbers, lists, text.

    Attributes:
        dataset: the data set; with ``indices``, where its labels are found.
        indices: the place of each sample in it.
        classes: as it has them.

    Raises:
        ValueError: if a component of ``shared`` is none; reading an item, if its input is neither
            a PIL image nor a tensor of images.
        PluginError: if nobody offers a transform of that name.

    Source: Xu, Liu, Li, Loy, 2020, https://arxiv.org/abs/2006.07114.
    """

    def __init__(self, dataset: Any, shared: Components = ()) -> None:
        self.dataset = dataset
        self.indices = range(len(cast(Sized, dataset)))
        self.classes = getattr(dataset, "classes", None)
        self._shared = _built(shared)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        item = self.dataset[index]
        sample = item if isinstance(item, Sample) else Sample(item[0], item[1])
        image = sample.input
        for transform in self._shared:
            image = transform(image)
        return replace(sample, input=Views(_turned(image, quarters) for quarters in QUARTERS))


def _turned(image: Any, quarters: int) -> Any:
    """Turn an image counter-clockwise."""
    if isinstance(image, torch.Tensor) and image.ndim >= 2:
        # torch leaves it a plain tensor, and transforms of torchvision tell images by their class.
        return torch.rot90(image, quarters, (-2, -1)).as_subclass(type(image))
    if hasattr(image, "rotate"):  # PIL's, without asking for that package
        return image.rotate(90 * quarters, expand=True)
    raise ValueError(
        "Rotations turns PIL images and tensors (..., H, W), got "
        + (f"a tensor {tuple(image.shape)}" if isinstance(image, torch.Tensor) else _kind(image))
    )


def _kind(image: Any) -> str:
    more = "; a data set needs it once" if isinstance(image, Views) else ""
    return f"{type(image).__name__}{more}"


def _built(components: Components) -> list[Callable[[Any], Any]]:
    if not components:
        return []
    registry = plugins()
    built = []
    for component in components:
        given: dict[str, Any] = (
            {"type": component} if isinstance(component, str) else dict(component)
        )
        if not isinstance(given.get("type"), str) or given.keys() - {"type", "params"}:
            raise ValueError(
                "shared takes transforms as {type: Name, params: {...}} or a name, got "
                f"{component!r}"
            )
        built.append(registry.create("transforms", given["type"], **(given.get("params") or {})))
    return built
