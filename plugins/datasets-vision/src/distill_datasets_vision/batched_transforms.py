"""Transforms of torchvision for a whole batch of images, each image with draws of its own.

Each is made of torchvision's own transform, from which it takes parameters and their checks. What
it draws for an image has the distribution of what torchvision draws, and is done to the image as
``torchvision.transforms.v2.functional`` does it, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image, Video  # type: ignore[attr-defined]

from distill_datasets_vision.transforms import torchvision_transforms

F: Any = functional
IMAGE_DIMENSIONS = 3
ATTEMPTS = 10
"""How often torchvision draws a box anew that does not fit into the image."""


class Batched:
    """Base of all: deterministic, on images (B, C, H, W).

    Attributes:
        draws: numbers, uniform in [0, 1), that it needs for an image.
        pointwise: whether each value it gives comes from one value alone.
    """

    draws = 0
    pointwise = False

    def __init__(self, transform: Any):
        self._transform = transform

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is an image (C, H, W) that lies in a tensor."""
        return _is_image(value) and value.ndim == IMAGE_DIMENSIONS

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images as torchvision's transform makes them."""
        return _plain(self._transform(images))


class Unchanged(Batched):
    """``ToImage``, ``PILToTensor`` and ``ToPureTensor``: tensors stay what they are."""

    pointwise = True

    def __init__(self, transform: Any):
        """Keep nothing of the transform: this goes from a loader's worker with every batch."""

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is a tensor of any kind that holds an image or a clip."""
        return _is_image(value)

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images."""
        return images


class ToDtype(Unchanged):
    """``ToDtype`` and ``ConvertImageDtype``."""

    def __init__(self, dtype: torch.dtype, scale: bool):
        self._dtype, self._scale = dtype, scale

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images in another type, ``[0, 255]`` as ``[0, 1]`` if scaled."""
        converted: torch.Tensor = F.to_dtype(images, dtype=self._dtype, scale=self._scale)
        return converted


class Normalize(Unchanged):
    """``Normalize``; mean and deviation lie on the device of the images after the first batch."""

    def __init__(self, mean: list[float], std: list[float]):
        self._values = mean, std
        self._made: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # to a loader worker, without what it has made
        return Normalize, self._values

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return ``(images - mean) / std``, by channel."""
        key = images.dtype, images.device
        if key not in self._made:
            mean, std = self._values
            F.normalize(images[:1].clone(), mean, std)  # which refuses what does not fit
            self._made[key] = [
                torch.as_tensor(value, dtype=images.dtype).view(-1, 1, 1).to(images.device)
                for value in self._values
            ]
        mean_of, std_of = self._made[key]
        return images.sub(mean_of).div_(std_of)


class RandomFlip(Batched):
    """``RandomHorizontalFlip`` and ``RandomVerticalFlip``: flipped where the draw is below p."""

    draws = 1

    def __init__(self, p: float, dim: int):
        self._p, self._dim = p, dim

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images, some of them flipped."""
        return torch.where(_where(draws[:, 0] < self._p, images), images.flip(self._dim), images)


class RandomGrayscale(Batched):
    """``RandomGrayscale``: without colours where the draw is below p."""

    draws = 1

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images, some of them grey, with as many channels."""
        grey = F.rgb_to_grayscale(images, num_output_channels=images.shape[1])
        return torch.where(_where(draws[:, 0] < self._transform.p, images), grey, images)


class RandomCrop(Batched):
    """``RandomCrop``: the first number chooses the row, the second the column."""

    draws = 2

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return a crop of each image.

        Raises:
            ValueError: if the crop is larger than the padded images.
        """
        made = self._transform
        height, width = made.size
        left, right, above, below = made.padding or (0, 0, 0, 0)
        if made.pad_if_needed:
            missing = max(0, height - (images.shape[-2] + above + below))
            above, below = above + missing, below + missing
            missing = max(0, width - (images.shape[-1] + left + right))
            left, right = left + missing, right + missing
        if any((left, right, above, below)):
            padding, mode = [left, above, right, below], made.padding_mode
            images = F.pad(images, padding, fill=made.fill, padding_mode=mode)
        room = images.shape[-2] - height + 1, images.shape[-1] - width + 1
        if min(room) < 1:
            raise ValueError(
                f"Required crop size {(height, width)} is larger than "
                f"{'padded ' if made.padding is not None else ''}input image size "
                f"{tuple(images.shape[-2:])}."
            )
        top, left_of = crop_offsets(draws, room)
        return crops(images, top, left_of, height, width)


class RandomResizedCrop(Batched):
    """``RandomResizedCrop``; 2 numbers for each of 10 attempts at a box, 2 for where it lies.

    Boxes are cut and resized one by one, since each has a size of its own.
    """

    draws = 2 * ATTEMPTS + 2

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return a resized crop of each image."""
        made = self._transform
        height, width = images.shape[-2:]
        boxes = resized_crop_boxes(draws, height, width, made.scale, made.ratio)
        options = {"interpolation": made.interpolation, "antialias": made.antialias}
        return torch.stack(
            [
                F.resized_crop(image, *box, size=made.size, **options)
                for image, box in zip(images, boxes.tolist(), strict=True)
            ]
        )


class RandomErasing(Batched):
    """``RandomErasing`` with constant values; draws as ``RandomResizedCrop`` and one in front."""

    draws = 2 * ATTEMPTS + 3

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images, some of them with a box in one colour.

        Raises:
            ValueError: if there are not as many values as channels.
        """
        made = self._transform
        channels, height, width = images.shape[-3:]
        if len(made.value) not in (1, channels):
            raise ValueError(f"value has {len(made.value)} numbers, the images {channels} channels")
        boxes, fits = erased_boxes(draws[:, 1:], height, width, made.scale, made.ratio)
        fits &= draws[:, 0] < made.p
        top, left, tall, wide = boxes.to(images.device).unbind(1)
        inside = _within(top, tall, height)[:, None, :, None]
        inside = inside & _within(left, wide, width)[:, None, None, :]
        value = torch.tensor(made.value, device=images.device)[:, None, None].to(images.dtype)
        return torch.where(inside & _where(fits, images), value, images)


class ColorJitter(Batched):
    """``ColorJitter``: 4 numbers for the order, 4 for the factors; image by image."""

    draws = 8

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images with other colours."""
        order = draws[:, :4].argsort(1).tolist()
        return torch.stack(
            [
                self._jittered(image, steps, numbers)
                for image, steps, numbers in zip(images, order, draws[:, 4:].tolist(), strict=True)
            ]
        )

    def _jittered(
        self, image: torch.Tensor, steps: list[int], numbers: list[float]
    ) -> torch.Tensor:
        made = self._transform
        ranges = (made.brightness, made.contrast, made.saturation, made.hue)
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for step in steps:
            bounds = ranges[step]
            if bounds is not None:
                image = adjust[step](image, bounds[0] + numbers[step] * (bounds[1] - bounds[0]))
        return image


def crop_offsets(draws: torch.Tensor, room: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns, each from 0 to one below ``room``, all alike likely."""
    rows, columns = room
    return (draws[:, 0] * rows).long(), (draws[:, 1] * columns).long()


def crops(
    images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return ``images[b, :, top[b]:top[b] + height, left[b]:left[b] + width]`` for each b."""
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    number = torch.arange(len(images), device=images.device)
    return windows[number, :, top.to(images.device), left.to(images.device)]


def resized_crop_boxes(
    draws: torch.Tensor, height: int, width: int, scale: Any, ratio: Any
) -> torch.Tensor:
    """Return top, left, height and width of a box in each image, int64 (B, 4).

    Args:
        draws: (B, 22): area and aspect ratio of ten attempts, then row and column.
        height: of the images.
        width: of the images.
        scale: bounds of the box's share of the image.
        ratio: bounds of width / height.
    """
    wide, tall = _sizes(draws, height * width, scale, ratio)
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    tall, wide, found = _first(tall, wide, fits)
    fallback = _central(height, width, ratio)
    tall = torch.where(found, tall, fallback[0])
    wide = torch.where(found, wide, fallback[1])
    top = (draws[:, -2].double() * (height - tall + 1)).long()
    left = (draws[:, -1].double() * (width - wide + 1)).long()
    top = torch.where(found, top, (height - tall) // 2)
    left = torch.where(found, left, (width - wide) // 2)
    return torch.stack([top, left, tall, wide], 1)


def erased_boxes(
    draws: torch.Tensor, height: int, width: int, scale: Any, ratio: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes as ``resized_crop_boxes`` does, and where one was found that fits.

    Here the ratio is height / width, and a box is less high and less wide than the image.
    """
    tall, wide = _sizes(draws, height * width, scale, ratio)
    tall, wide, found = _first(tall, wide, (tall < height) & (wide < width))
    top = (draws[:, -2].double() * (height - tall + 1)).long()
    left = (draws[:, -1].double() * (width - wide + 1)).long()
    return torch.stack([top, left, tall, wide], 1), found


def _sizes(
    draws: torch.Tensor, area: int, scale: Any, ratio: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sqrt(area * ratio) and sqrt(area / ratio) of each attempt, whole numbers (B, 10)."""
    numbers = draws[:, : 2 * ATTEMPTS].double()
    areas = area * (scale[0] + numbers[:, 0::2] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = torch.exp(low + numbers[:, 1::2] * (high - low))
    return (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()


def _first(
    tall: torch.Tensor, wide: torch.Tensor, fits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first size that fits of each row, and whether there is one."""
    chosen = fits.to(torch.uint8).argmax(1, keepdim=True)
    return tall.gather(1, chosen)[:, 0], wide.gather(1, chosen)[:, 0], fits.any(1)


def _central(height: int, width: int, ratio: Any) -> tuple[int, int]:
    """Return the size of torchvision's box where none of the attempts fits."""
    if width / height < min(ratio):
        return round(width / min(ratio)), width
    if width / height > max(ratio):
        return height, round(height * max(ratio))
    return height, width


def _within(first: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    places = torch.arange(size, device=first.device)
    return (places >= first[:, None]) & (places < (first + length)[:, None])


def _where(condition: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return condition.to(images.device).view(-1, 1, 1, 1)


def _is_image(value: Any) -> bool:
    """Whether ``value`` is a plain tensor or torchvision's image or clip, and none of a mask."""
    return type(value) in (torch.Tensor, Image, Video) and value.ndim >= IMAGE_DIMENSIONS


def _plain(images: Any) -> torch.Tensor:
    tensor: torch.Tensor = images.as_subclass(torch.Tensor)
    return tensor


def _of_kinds(value: Any) -> bool:
    """Whether a parameter has a value for each kind of tensor, which batches do not tell apart."""
    return isinstance(value, Mapping)


def _make(name: str, transform: Any) -> Batched | None:
    """Return the batched form of one of torchvision's transforms, ``None`` where it has none."""
    if _of_kinds(getattr(transform, "fill", None)) or _of_kinds(getattr(transform, "dtype", None)):
        return None
    if name == "RandomErasing":
        return RandomErasing(transform) if transform.value is not None else None
    if name == "Normalize":
        return Normalize(transform.mean, transform.std)
    if name in ("ToDtype", "ConvertImageDtype"):
        return ToDtype(transform.dtype, getattr(transform, "scale", True))
    if name in ("RandomHorizontalFlip", "RandomVerticalFlip"):
        return RandomFlip(transform.p, -1 if name == "RandomHorizontalFlip" else -2)
    return _FORMS[name](transform)


_FORMS: dict[str, type[Batched]] = {
    "CenterCrop": Batched,
    "ColorJitter": ColorJitter,
    "ConvertImageDtype": ToDtype,
    "Grayscale": Batched,
    "Normalize": Normalize,
    "PILToTensor": Unchanged,
    "Pad": Batched,
    "RandomCrop": RandomCrop,
    "RandomErasing": RandomErasing,
    "RandomGrayscale": RandomGrayscale,
    "RandomHorizontalFlip": RandomFlip,
    "RandomResizedCrop": RandomResizedCrop,
    "RandomVerticalFlip": RandomFlip,
    "Resize": Batched,
    "ToDtype": ToDtype,
    "ToImage": Unchanged,
    "ToPureTensor": Unchanged,
}


def batched_transforms() -> dict[str, Callable[..., Batched | None]]:
    """Return the batched forms by name, with the parameters of the transform of that name.

    A factory returns ``None`` where there is no batched form with these parameters: ``fill`` or
    ``dtype`` that differ by kind of tensor, and ``RandomErasing`` with ``value: random``.
    """
    offered = torchvision_transforms()
    return {name: _factory(name, offered[name]) for name in _FORMS}


def _factory(name: str, transform: Callable[..., Any]) -> Callable[..., Batched | None]:
    @functools.wraps(transform, updated=())
    def build(*args: Any, **params: Any) -> Batched | None:
        return _make(name, transform(*args, **params))

    return build
