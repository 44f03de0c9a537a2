"""Samples a second: small images in memory and packed photos, against torchvision's pipeline.

The images are as CIFAR-10 has them (bytes of 32 x 32 pixels in memory, noise), and so is the usual
augmentation: a crop out of padding, a flip, scaling, normalizing. On the one side torch's loader
and torchvision's transforms (v2) take each image as PIL image through them, on the other a stage
with ``data.in_memory: true`` takes whole batches. Photos are 500 x 375 pixels, JPEGs in a folder,
and are cut and resized to 224 x 224; on the other side ``distill data pack`` has written them at
256 pixels, as JPEGs and as raw pixels. All sides take turns, on one thread each, up to batches of
floats on the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import taking_turns
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import Compose  # type: ignore[attr-defined]

from distill import plugins
from distill.data.keepable import split
from distill.data.keeping import keep
from distill.data.loader import Loading, training_batches
from distill.data.plan import Plan
from distill.data.source import Source

BATCH, PHOTOS_BATCH = 128, 32
"""Samples a batch: of photos fewer, since memory for more than 32 MB is fresh from the system each
time, and where that is slow, as in some containers, little else is measured."""
NORMAL = {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]}
SMALL: dict[str, dict[str, Any]] = {
    "RandomCrop": {"size": 32, "padding": 4},
    "RandomHorizontalFlip": {},
    "ToImage": {},
    "ToDtype": {"dtype": torch.float32, "scale": True},
    "Normalize": NORMAL,
}

PHOTOS: dict[str, dict[str, Any]] = {
    "RandomResizedCrop": {"size": 224},
    "RandomHorizontalFlip": {},
    "ToImage": {},
    "ToDtype": {"dtype": torch.float32, "scale": True},
    "Normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
GRAINS = {64: 0.5, 16: 0.25, 4: 0.15, 2: 0.1}
"""Pixels across of the patches in a picture, and their weights; its JPEG has some 50 kB."""


class SmallImages(Dataset[tuple[Image.Image, int]]):
    """Noise in the form of torchvision's CIFAR10: an array, a PIL image when it is read."""

    def __init__(self, size: int):
        generator = np.random.default_rng(0)
        self.data = generator.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), index % 10


class Transformed(Dataset[tuple[Any, int]]):
    """A data set with transforms, as scripts compose them."""

    def __init__(self, dataset: Dataset[Any], transforms: dict[str, dict[str, Any]]):
        self.dataset = dataset
        self.transform = Compose([getattr(v2, name)(**p) for name, p in transforms.items()])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def plain(
    dataset: Dataset[Any],
    transforms: dict[str, dict[str, Any]],
    batches: int,
    device: torch.device,
    size: int = BATCH,
) -> Callable[[], None]:
    """Return a work that reads batches as a script of one's own would."""
    loader = DataLoader(Transformed(dataset, transforms), size, shuffle=True, drop_last=True)
    endless = _endless(lambda: iter(loader))

    def read() -> None:
        for _ in range(batches):
            images, labels = next(endless)
            images.to(device), labels.to(device)

    return read


def by_distill(
    source: Source, batches: int, device: torch.device, size: int = BATCH, *, in_memory: bool
) -> Callable[[], None]:
    """Return a work that reads batches as a stage does."""
    if in_memory:
        source = keep(source, split(source), Loading(), device)
    plan = Plan(len(source), size, drop_last=True)
    endless = _endless(lambda: training_batches(source, plan, seed=0, epoch=0))

    def read() -> None:
        for _ in range(batches):
            next(endless).to(device, non_blocking=True)

    return read


def source_of(dataset: Dataset[Any], transforms: dict[str, dict[str, Any]]) -> Source:
    """Return a data set with transforms, as the file of an experiment describes it."""
    registry = plugins()
    made = [registry.create("transforms", name, **params) for name, params in transforms.items()]
    known = registry.names("batched_transforms")
    batched = [
        registry.create("batched_transforms", name, **params) if name in known else None
        for name, params in transforms.items()
    ]
    return Source("images", dataset, made, batched=batched)


def _endless(begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        yield from begin()


def small_images(size: int, batches: int, turns: int, device: torch.device) -> None:
    """Measure small images in memory and print."""
    dataset = SmallImages(size)
    source = source_of(dataset, SMALL)
    works = {
        "torchvision, image by image": plain(dataset, SMALL, batches, device),
        "distill, image by image": by_distill(source, batches, device, in_memory=False),
        "distill, in_memory": by_distill(source, batches, device, in_memory=True),
    }
    _print("32 x 32 pixels, crop and flip", works, batches * BATCH, turns, device)


def packed_photos(count: int, size: int, turns: int, device: torch.device) -> None:
    """Measure photos in a folder and packed, and print."""
    batches = 4
    registry = plugins()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", count)
        photos = registry.create("datasets", "ImageFolder", root=str(folder / "photos"))
        works = {"torchvision, a folder of JPEGs": plain(photos, PHOTOS, batches, device, size)}
        works["distill, a folder of JPEGs"] = by_distill(
            source_of(photos, PHOTOS), batches, device, size, in_memory=False
        )
        for encoding in ("jpeg", "raw"):
            packer = registry.create("packers", encoding, size=256, quality=90, workers=0)
            packer(photos, folder / encoding, {})
            packed = registry.create("datasets", "Packed", root=str(folder / encoding))
            source = source_of(packed, PHOTOS)
            works[f"distill, packed as {encoding}"] = by_distill(
                source, batches, device, size, in_memory=False
            )
        _print("500 x 375 pixels, to 224 x 224", works, batches * size, turns, device)


def write_photos(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(count):
        picture = np.zeros((375, 500, 3), np.float32)
        for grain, weight in GRAINS.items():
            shape = (375 // grain, 500 // grain, 3)
            patches = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            picture += weight * np.asarray(patches.resize((500, 375)), np.float32)
        file = folder / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def _print(
    title: str,
    works: dict[str, Callable[[], None]],
    samples: int,
    turns: int,
    device: torch.device,
) -> None:
    seconds = taking_turns(list(works.values()), turns, device)
    print(f"\n| {title} | samples/s | ratio |")
    print("| ---- | ---: | ---: |")
    for name, taken in zip(works, seconds, strict=True):
        print(f"| {name} | {samples / taken:,.0f} | {seconds[0] / taken:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=9, help="turns of each side")
    parser.add_argument("--size", type=int, default=10_000, help="small images")
    parser.add_argument("--photos", type=int, default=256, help="photos, at least a batch")
    parser.add_argument("--batch", type=int, default=PHOTOS_BATCH, help="photos a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    small_images(options.size, 20, options.turns, device)
    packed_photos(options.photos, options.batch, options.turns, device)


if __name__ == "__main__":
    main()
