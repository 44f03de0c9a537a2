"""torchvision's transforms (v2) by name, as the installed version has them."""

from __future__ import annotations

import inspect

from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import Transform  # type: ignore[attr-defined]

LEFT_OUT = {
    "Transform": "a base to derive from",
    "Compose": "takes transforms; an experiment file lists them itself",
    "RandomApply": "takes transforms",
    "RandomChoice": "takes transforms",
    "RandomOrder": "takes transforms",
    "Lambda": "takes a function",
    "CutMix": "mixes the images and labels of a batch",
    "MixUp": "mixes the images and labels of a batch",
    "FiveCrop": "makes several images of one",
    "TenCrop": "makes several images of one",
    "ClampBoundingBoxes": "acts on boxes, not on the image",
    "ClampKeyPoints": "acts on key points, not on the image",
    "ConvertBoundingBoxFormat": "acts on boxes, not on the image",
    "RandomIoUCrop": "needs boxes beside the image",
    "SanitizeBoundingBoxes": "acts on boxes, not on the image",
    "SanitizeKeyPoints": "acts on key points, not on the image",
    "SetClampingMode": "acts on boxes, not on the image",
}
"""Names of ``torchvision.transforms.v2`` that are not offered, and why."""


def torchvision_transforms() -> dict[str, type[nn.Module]]:
    """Return every v2 transform by its name that turns one image (or clip) into one.

    An image is a PIL image or a tensor (..., C, H, W); ``ToImage`` followed by
    ``ToDtype(dtype=float32, scale=true)`` makes of the first a tensor in [0, 1].
    """
    return {
        name: offered
        for name, offered in vars(v2).items()
        if inspect.isclass(offered)
        and issubclass(offered, Transform)
        and not name.startswith("_")
        and name not in LEFT_OUT
    }
