"""``distill data``: images of an experiment's data set, packed and trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
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


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])


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


CHOSEN = ("-s", "datasets.photos.wrappers[0].params.indices=[5, 0, 3, 1]")


def test_all_bad_samples_are_named_with_their_files_and_skipped_if_asked(file: Path) -> None:
    photos = file.parent / "photos"
    truncate(photos / "b" / "5.png")
    (photos / "a" / "0.png").write_bytes(b"no image")
    refused = packed(file, "photos", "packed", *CHOSEN)
    assert refused.exit_code == 5, refused.output
    *_, error, first, second = refused.stderr.splitlines()
    assert error == "error: 2 samples of 4 cannot be packed; --skip-bad leaves bad samples out"
    assert first.startswith("  data set 'photos': sample 0 cannot be read: OSError: ")
    assert first.endswith(f" ({photos / 'b' / '5.png'})")
    assert second.startswith("  data set 'photos': sample 1 cannot be read: UnidentifiedImageError")
    assert second.count(str(photos / "a" / "0.png")) == 1
    assert not (file.parent / "packed" / "meta.json").exists()

    skipped = packed(file, "photos", "packed", *CHOSEN, "--skip-bad", "--format", "raw")
    assert skipped.exit_code == 0, skipped.output
    assert skipped.stderr.splitlines()[-3:] == ["2 samples skipped:", first, second]
    assert "2 samples in 6 files, 0.0 MB; 2 samples skipped; to be read with {" in skipped.stdout
    source = Builder(load(file), plugins()).source("small")
    assert (len(source), source.classes, source.dataset.targets) == (2, ["a", "b"], [1, 0])
    for (image, _), name in zip(source.dataset, ("b/1.png", "a/2.png"), strict=True):
        pixels = np.array(Image.open(photos / name))
        assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_where_all_are_bad_the_first_are_named_and_none_is_skipped(file: Path) -> None:
    for number in range(22):
        (file.parent / "broken" / f"b{number:02}.png").write_bytes(b"no image")
    result = packed(file, "broken", "x", "--skip-bad")
    assert result.exit_code == 5, result.output
    heading, *named, more = result.stderr.splitlines()[-22:]
    assert heading == "error: none of 23 samples can be packed"
    assert len(named) == 20
    assert all(f"sample {n} cannot be read" in line for n, line in enumerate(named))
    assert more == "  ... and 3 more"
    assert not (file.parent / "x" / "meta.json").exists()


@pytest.mark.parametrize(
    "name", ["a/b", "train", "out, v2: x", "1e3", "0o7", "null", "- #1", "{a}", 'a "b"', "größe/日"]
)
def test_what_is_printed_to_read_a_folder_is_read_by_a_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(file.parent)
    result = CliRunner().invoke(main, ["data", "pack", "exp.yaml", "photos", "-o", name])
    assert result.exit_code == 0, result.output
    written = result.stdout.partition("to be read with ")[2]
    text = file.read_text("utf-8").replace("datasets:\n", f"datasets:\n  pasted: {written}")
    file.write_text(text, "utf-8")
    component = load(file).datasets["pasted"].component
    assert (component.type, dict(component.params)) == ("Packed", {"root": name})


def test_check_says_that_data_is_not_opened_and_with_data_finds_its_faults(file: Path) -> None:
    assert packed(file, "photos", "packed").exit_code == 0
    truncate(file.parent / "packed" / "images.bin")
    for fault in ("that were written; pack it again", "it was not packed to its end"):
        unopened = CliRunner().invoke(main, ["check", str(file)])
        said = "no faults (1 stage, 1 model); data and checkpoints not opened, see --data\n"
        assert (unopened.exit_code, unopened.stdout) == (0, f"{file}: {said}")
        opened = CliRunner().invoke(main, ["check", str(file), "--data"])
        assert opened.exit_code in (2, 5), opened.output
        assert f"{file}:8:3: datasets.small: Packed cannot be built: " in opened.stderr
        assert fault in opened.stderr
        (file.parent / "packed" / "meta.json").unlink(missing_ok=True)


def test_packing_that_is_stopped_begins_anew(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(samples: object, index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.cli_data._Samples.__getitem__", stopped)
    result = packed(file, "photos", "packed", "--workers", "0")
    assert result.exit_code == 75, result.output
    assert result.stderr.endswith("\nstopped; the same command begins anew\n")


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
