"""torchvision's transforms on whole batches, through core: late, and of data in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill import plugins
from distill.data.batch import Batch
from distill.data.keepable import split
from distill.data.keeping import keep
from distill.data.kept import OneByOne
from distill.data.loader import Loading, evaluation_batches, training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.testing import toy_experiment
from distill.training.build import Builder

CPU = torch.device("cpu")
REGISTRY = plugins()
TO_FLOATS: list[dict[str, Any]] = [
    {"type": "ToImage"},
    {"type": "ToDtype", "params": {"dtype": "float32", "scale": True}},
    {
        "type": "Normalize",
        "params": {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]},
    },
]
CROP_AND_FLIP: list[dict[str, Any]] = [
    {"type": "RandomCrop", "params": {"size": 20, "padding": 4}},
    {"type": "RandomHorizontalFlip"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of small pictures of two classes."""
    generator = np.random.default_rng(0)
    for number in range(12):
        picture = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        file = tmp_path / "pictures" / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return tmp_path


def opened(folder: Path, transforms: list[dict[str, Any]], **more: Any) -> Source:
    data = {"type": "ImageFolder", "params": {"root": str(folder / "pictures")}}
    datasets = {"train": {**data, "transforms": transforms, **more}, "val": {"type": "ToyData"}}
    return Builder(toy_experiment(folder, {}, datasets=datasets), REGISTRY).source("train")


def epoch_of(source: Source, workers: int = 0) -> list[Batch]:
    batches = training_batches(source, Plan(12, 5), Loading(workers), seed=1, epoch=2)
    return list(batches)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("transforms", [CROP_AND_FLIP + TO_FLOATS, TO_FLOATS + CROP_AND_FLIP])
def test_bytes_become_floats_on_the_device_to_the_same_bits(
    folder: Path, transforms: list[dict[str, Any]], workers: int
) -> None:
    source = opened(folder, transforms)
    batches, plain = epoch_of(source, workers), epoch_of(replace(source, batched=()))
    is_late = transforms[-1]["type"] == "Normalize"
    assert batches[0].inputs.dtype == (torch.uint8 if is_late else torch.float32)
    assert (batches[0].pending is not None) == is_late
    if batches[0].pending is not None:  # images are tensors from ToImage on
        assert len(batches[0].pending.transforms) == 2
    for batch, expected in zip(batches, plain, strict=True):
        assert torch.equal(batch.to(CPU).inputs, expected.inputs)
        assert torch.equal(batch.targets, expected.targets)
    strided = batches[0].to(CPU, memory_format=torch.channels_last).inputs
    assert strided.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(strided, plain[0].inputs)


def test_bytes_are_kept_and_floats_made_of_batches(folder: Path) -> None:
    source = opened(folder, TO_FLOATS)
    kept = keep(source, split(source), Loading(), CPU)
    assert (kept.inputs.dtype, kept.inputs.shape) == (torch.uint8, (12, 3, 20, 20))
    (batch,) = evaluation_batches(kept, 12, seed=1)
    (expected,) = evaluation_batches(source, 12, seed=1)
    assert torch.equal(batch.to(CPU).inputs, expected.to(CPU).inputs)


def test_crops_of_pictures_are_taken_of_whole_batches(folder: Path) -> None:
    source = opened(folder, CROP_AND_FLIP + TO_FLOATS[:1])
    chosen = split(source)
    assert [step.names for step in chosen.steps] == [["RandomCrop", "RandomHorizontalFlip"]]
    kept = keep(source, chosen, Loading(), CPU)
    for batch in epoch_of(kept):
        for image, index in zip(batch.to(CPU).inputs, batch.index, strict=True):
            padded = torch.nn.functional.pad(kept.inputs[index], [4] * 4)
            windows = padded.unfold(1, 20, 1).unfold(2, 20, 1)
            windows = torch.cat([windows, windows.flip(-1)], 1)
            assert (windows == image[:, None, None]).all((0, 3, 4)).sum() == 1


def test_what_has_no_form_for_batches_is_applied_sample_by_sample(folder: Path) -> None:
    rotation = {"type": "RandomRotation", "params": {"degrees": 30}}
    source = opened(folder, [*TO_FLOATS[:1], rotation, *CROP_AND_FLIP, *TO_FLOATS[1:]])
    kept = keep(source, split(source), Loading(), CPU)
    assert [type(step) is OneByOne for step in kept.steps] == [True, False]
    assert epoch_of(kept)[0].to(CPU).inputs.shape == (5, 3, 20, 20)
