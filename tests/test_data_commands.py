"""``distill data``: images of an experiment's data set, packed and trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from distill import load, plugins
from distill.cli import main
from distill.training.build import Builder

FILE = """\
name: packed
device: cpu
datasets:
  photos:
    type: ImageFolder
    params: {root: PHOTOS}
    wrappers: [{type: Subset, params: {indices: [0, 1, 2, 5]}}]
  small:
    type: Packed
    params: {root: PACKED}
    transforms: [{type: CenterCrop, params: {size: 8}}]
  broken: {type: ImageFiles, params: {root: BROKEN}}
models: {m: {type: resnet18}}
stages:
  - name: one
    epochs: 1
    data: {train: small, batch_size: 2}
    student: {model: m}
    criterion: {ce: {type: CrossEntropyLoss}}
    optimizer: {type: SGD, params: {lr: 0.1}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    text = FILE
    for name in ("photos", "packed", "broken"):
        text = text.replace(name.upper(), str(tmp_path / name))
    (tmp_path / "exp.yaml").write_text(text, "utf-8")
    return tmp_path / "exp.yaml"


def packed(file: Path, dataset: str, folder: str, *more: str) -> Result:
    output = str(file.parent / folder)
    return CliRunner().invoke(main, ["data", "pack", str(file), dataset, "-o", output, *more])


def test_a_data_set_is_packed_behind_its_wrappers_and_read_by_the_file(file: Path) -> None:
    result = packed(file, "photos", "packed", "--size", "10", "--format", "raw", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert "4 samples in 6 files" in result.output
    assert f"{{type: Packed, params: {{root: {file.parent / 'packed'}}}}}" in result.output
    source = Builder(load(file), plugins()).source("small")
    assert (len(source), source.classes) == (4, ["a", "b"])
    assert source.dataset[3][0].shape == (3, 10, 15)
    assert source.read(3).input.shape == (3, 8, 8)


def test_what_cannot_be_packed_is_told_in_a_line(file: Path) -> None:
    for arguments, code, message in (
        (("phots", "x"), 2, "there is no data set 'phots' in"),
        (("photos", "x", "--format", "jpg"), 2, "--format jpg: write one of jpeg, raw"),
        (("photos", "photos"), 2, "is there already, with something else"),
        (("broken", "x"), 5, "data set 'broken': sample 0 cannot be read"),
    ):
        result = packed(file, *arguments)
        assert result.exit_code == code, result.output
        assert message in result.output
        assert "Traceback" not in result.output
