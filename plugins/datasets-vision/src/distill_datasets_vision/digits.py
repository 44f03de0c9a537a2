"""Handwritten digits that come with the package: no download, seconds to train on."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

Split = Literal["train", "validation", "test"]

VALIDATION_PER_CLASS = 25
TEST_PER_CLASS = 50
INK = 16.0


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """The 1,797 handwritten digits, 8 x 8 pixels, that scikit-learn carries too.

    An item is ``(image, label)``: the image float32 (1, 8, 8) from 0 (paper) to 1 (ink), the label
    an ``int`` from 0 to 9.

    The split goes by position, so it is the same everywhere: of each class the last 50 images are
    for testing (500), the 25 before them for validation (250), all others for training (1,047).
    The source seems to keep the order in which people wrote, so that the test images show other
    hands than the training images: a split that takes from everywhere is easier (99 % instead of
    97 % for ``DigitsTeacher``).

    Args:
        split: ``train``, ``validation`` or ``test``.
        labels_per_class: keep only the first so many images of each class of the split; all of
            them if ``None``. For studies with few labels.

    Attributes:
        classes: the names of the ten classes.

    Raises:
        ValueError: if there is no such split, or a class has fewer images than asked for.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0 (the part that UCI calls test set).
    """

    classes = tuple("0123456789")

    def __init__(self, split: Split = "train", labels_per_class: int | None = None) -> None:
        if split not in get_args(Split):
            raise ValueError(f"Digits has no split {split!r}: one of {', '.join(get_args(Split))}")
        images, labels = _read()
        chosen = _positions(labels, split, labels_per_class)
        self._images = torch.from_numpy(images[chosen]).unsqueeze(1)
        self._labels = [int(label) for label in labels[chosen]]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[index].float() / INK, self._labels[index]


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 (1797, 8, 8) from 0 to 16, and the labels, uint8 (1797,)."""
    with (
        (files(__package__) / "data" / "digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        return arrays["images"], arrays["labels"]


def _positions(labels: np.ndarray, split: Split, labels_per_class: int | None) -> np.ndarray:
    """Return where the images of a split stand, in the order of the source."""
    held_out = VALIDATION_PER_CLASS + TEST_PER_CLASS
    part = {
        "train": slice(None, -held_out),
        "validation": slice(-held_out, -TEST_PER_CLASS),
        "test": slice(-TEST_PER_CLASS, None),
    }[split]
    classes = [np.flatnonzero(labels == label)[part] for label in range(len(Digits.classes))]
    fewest = min(map(len, classes))
    if labels_per_class is not None and not 1 <= labels_per_class <= fewest:
        raise ValueError(
            f"labels_per_class is {labels_per_class}: "
            f"the split {split!r} of Digits has between 1 and {fewest} of every class"
        )
    return np.sort(np.concatenate([positions[:labels_per_class] for positions in classes]))
