"""Targets as tv_tensors, so that joint transforms change boxes and masks along with the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset, VOCDetection, wrap_dataset_for_transforms_v2
from torchvision.tv_tensors import Mask  # type: ignore[attr-defined]

from distill import Sample
from distill_datasets_vision.masks import mask_of_image

BACKGROUND = "__background__"


class TVTensors(Dataset[Any]):
    """A data set whose targets are tv_tensors: boxes, and masks (H, W).

    With the classes that ``torchvision.datasets.wrap_dataset_for_transforms_v2`` knows
    (CocoDetection, VOCDetection, VOCSegmentation, Kitti, Cityscapes, OxfordIIITPet, ...) it does
    what that does; with any other data set, targets that are PIL images become masks and everything
    else stays as it is. Put it directly around torchvision's data set, before other wrappers.

    Args:
        dataset: the data set.
        target_keys: which parts of a target that is a dictionary to keep, e.g. ``boxes``,
            ``labels``, ``masks``; torchvision's choice for the class if ``None``.
        classes: names of what is in the boxes of a ``VOCDetection``, where these are not the twenty
            of VOC. Their labels count from 1, as 0 is the background.

    Attributes:
        classes: of the data set, where it has them, or the given ones after the background.

    Raises:
        ValueError: if the data set has no such keys or classes to choose; reading an item, if its
            mask has colours or a box another class.
        RuntimeError: if torchvision knows the data set but not this setting of it.
    """

    def __init__(
        self,
        dataset: Any,
        target_keys: list[str] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        if classes is not None and not isinstance(dataset, VOCDetection):
            raise ValueError(f"classes are for VOCDetection, not for {type(dataset).__name__}")
        self._names = None if classes is None else tuple(classes)
        self._keys = tuple(target_keys) if target_keys else ("boxes", "labels")
        keys = target_keys if classes is None else ["annotation", "boxes"]
        self._dataset = _wrapped(dataset, keys)
        if classes is not None:
            self.classes: Sequence[str] = (BACKGROUND, *classes)
        elif hasattr(dataset, "classes"):
            self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        item = self._read(index)
        if isinstance(item, Sample):
            return replace(item, target=_with_masks(item.target))
        image, target = item
        if self._names is not None:
            target = self._labelled(target, self._names)
        return image, _with_masks(target)

    def _read(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except KeyError as error:
            if not isinstance(self._dataset, VOCDetection):
                raise
            raise ValueError(
                f"its annotation has no {error}, or {error} is none of VOC's classes: "
                "others are to be named with params.classes"
            ) from error

    def _labelled(self, target: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        found = [box["name"] for box in target["annotation"]["object"]]
        unknown = set(found) - set(names)
        if unknown:
            raise ValueError(f"a box has the class '{min(unknown)}'; given are {', '.join(names)}")
        labels = torch.tensor([1 + names.index(name) for name in found])
        return {key: {**target, "labels": labels}[key] for key in self._keys}


def _wrapped(dataset: Any, target_keys: list[str] | None) -> Any:
    if isinstance(dataset, VisionDataset):
        try:
            return wrap_dataset_for_transforms_v2(dataset, target_keys)
        except TypeError:  # a class it does not know
            pass
    if target_keys is not None:
        raise ValueError(f"there are no target_keys to choose of {type(dataset).__name__}")
    return dataset


def _with_masks(target: Any) -> Any:
    """Make a mask (H, W) of an image, also inside a tuple, and of torchvision's mask (1, H, W)."""
    if isinstance(target, Image.Image):
        return mask_of_image(target)
    if isinstance(target, tuple):
        return tuple(_with_masks(part) for part in target)
    if isinstance(target, Mask) and target.ndim == 3 and len(target) == 1:
        return Mask(target[0])
    return target
