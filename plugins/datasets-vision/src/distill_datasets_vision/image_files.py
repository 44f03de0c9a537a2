"""Images in folders: without labels, and with a mask each."""

from __future__ import annotations

import os
from collections.abc import Iterable

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.tv_tensors import Mask  # type: ignore[attr-defined]

from distill import Sample
from distill_datasets_vision.masks import mask_of_image

NAMES_SHOWN = 5


class ImageFiles(Dataset[Sample]):
    """All images in a folder and the folders in it, without labels.

    An item is a ``Sample`` whose input is a PIL image in RGB and whose target is ``None``. Files
    are in the order of their paths; which endings count is torchvision's ``IMG_EXTENSIONS``.

    Args:
        root: the folder.

    Attributes:
        files: paths below ``root``.

    Raises:
        FileNotFoundError: if there is no such folder or no image in it.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        self.files = _images_below(self.root, "ImageFiles")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(pil_loader(os.path.join(self.root, self.files[index])))


class ImageMaskFolders(Dataset[tuple[Image.Image, Mask]]):
    """Images in one folder, and a mask of the same name for each in another, as CamVid has them.

    An item is ``(image, mask)``: a PIL image in RGB and a ``tv_tensors.Mask``, uint8 (H, W), that
    holds class numbers. Names are paths without their ending, so ``a/1.jpg`` goes with
    ``a/1.png``; items are in their order. In a palette image the class number is the index.

    Args:
        images: folder of the images.
        masks: folder of the masks.

    Attributes:
        names: the names.

    Raises:
        FileNotFoundError: if a folder is missing or empty, or an image or mask has no partner.
        ValueError: if two files of a folder have one name; reading a mask, if it has colours.
    """

    def __init__(self, images: str, masks: str) -> None:
        self._images = _by_name(images)
        self._masks = _by_name(masks)
        _refuse_unpaired("image", self._images.keys() - self._masks.keys(), "mask", masks)
        _refuse_unpaired("mask", self._masks.keys() - self._images.keys(), "image", images)
        self.names = sorted(self._images)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, Mask]:
        name = self.names[index]
        with Image.open(self._masks[name]) as mask:
            return pil_loader(self._images[name]), mask_of_image(mask)


def _images_below(root: str, dataset: str) -> list[str]:
    """Return the paths, relative to ``root``, of the images in it, in order."""
    found = [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if file.lower().endswith(IMG_EXTENSIONS)
    ]
    if not found:
        reason = f" ({', '.join(IMG_EXTENSIONS)})"
        if not os.path.isdir(root):
            reason = ": there is no such folder"
        raise FileNotFoundError(f"{dataset} finds no data: looked for images in {root}{reason}")
    return sorted(found, key=lambda path: path.split(os.sep))


def _by_name(folder: str) -> dict[str, str]:
    """Return name -> path of the images in a folder."""
    root = os.path.abspath(os.path.expanduser(folder))
    files: dict[str, str] = {}
    for file in _images_below(root, "ImageMaskFolders"):
        name = os.path.splitext(file)[0]
        path = os.path.join(root, file)
        if name in files:
            raise ValueError(f"ImageMaskFolders: {files[name]} and {path} have the same name")
        files[name] = path
    return files


def _refuse_unpaired(kind: str, names: Iterable[str], other: str, folder: str) -> None:
    alone = sorted(names)
    if alone:
        shown = ", ".join(alone[:NAMES_SHOWN]) + (", ..." if len(alone) > NAMES_SHOWN else "")
        raise FileNotFoundError(
            f"ImageMaskFolders: {len(alone)} {kind}{'s' * (len(alone) > 1)} without {other} "
            f"in {os.path.abspath(os.path.expanduser(folder))}: {shown}"
        )
