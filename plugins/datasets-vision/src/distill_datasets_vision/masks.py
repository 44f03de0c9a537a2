"""Masks from images that hold class numbers."""

from __future__ import annotations

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.tv_tensors import Mask  # type: ignore[attr-defined]

CLASS_NUMBER_MODES = frozenset({"1", "L", "P"})


def mask_of_image(image: Image.Image) -> Mask:
    """Return the class numbers of an image as a mask, uint8 (H, W).

    Raises:
        ValueError: if the image has colours and not a number for each pixel.
    """
    if image.mode not in CLASS_NUMBER_MODES:
        name = getattr(image, "filename", "") or "the mask"
        raise ValueError(
            f"{name} is an image of mode {image.mode}; "
            "a mask has one class number per pixel (mode L or P)"
        )
    return Mask(pil_to_tensor(image)[0].to(torch.uint8))
