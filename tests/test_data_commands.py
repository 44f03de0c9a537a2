"""``distill data``: images of an experiment's data set, packed and trained on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
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
    refused = packed(file, "photos", "packed", *CHOSEN, "--format", "raw")
    assert refused.exit_code == 5, refused.output
    *_, error, first, second = refused.stderr.splitlines()
    assert error == "error: 2 samples of 4 cannot be packed; --skip-bad leaves bad samples out"
    assert first.startswith("  data set 'photos': sample 0 cannot be read: OSError: ")
    assert first.endswith(f" ({photos / 'b' / '5.png'})")
    assert second.startswith("  data set 'photos': sample 1 cannot be read: UnidentifiedImageError")
    assert second.count(str(photos / "a" / "0.png")) == 1
    assert not list(file.parent.glob(".*.lock"))
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


def test_packing_that_is_stopped_says_that_it_goes_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(samples: object, index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.cli_data._Samples.__getitem__", stopped)
    result = packed(file, "photos", "packed", "--workers", "0")
    assert result.exit_code == 75, result.output
    assert result.stderr.endswith("\nstopped; the same command goes on from here\n")


PLUGIN = """\
import os
import signal

from distill import hookimpl
from torchvision.datasets import ImageFolder


class Killed(ImageFolder):
    def __init__(self, root):
        super().__init__(root)
        if "RELABELLED" in os.environ:
            self.targets = [1 - target for target in self.targets]

    def __getitem__(self, index):
        if str(index) == os.environ.get("KILLED_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@hookimpl
def distill_datasets():
    return {"Killed": Killed}
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_packing_that_is_killed_goes_on_to_the_same_bytes(file: Path, workers: str) -> None:
    plugin = file.parent / "killed.py"
    plugin.write_text(PLUGIN, "utf-8")
    options = ["-s", "datasets.photos.type=Killed", "--plugin", str(plugin), "--workers", workers]
    command = [sys.executable, "-m", "distill", "data", "pack", str(file), "photos", *options]
    environment = {**os.environ, "KILLED_AT": "2"}
    folder = file.parent / "killed"
    command += ["-o", str(folder)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == (5 if workers == "1" else -signal.SIGKILL)
    assert "Traceback" not in killed.stderr
    assert ("fewer --workers need less; with" in killed.stderr) == (workers == "1")
    assert {"images.bin", "packing.jsonl"} == contents(folder).keys()
    result = packed(file, "photos", "killed", *options)
    assert result.exit_code == 0, result.output
    if workers == "0":  # a worker takes with it what it has not yet handed over
        assert "\ngoing on: 2 of 4 samples have been read already\n" in result.stderr
    assert packed(file, "photos", "whole", *options).exit_code == 0
    assert contents(folder) == contents(file.parent / "whole")


@pytest.mark.parametrize("other", ["quality", "order", "name", "labels", "code"])
def test_what_is_half_packed_of_other_files_labels_settings_or_code_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    plugin = file.parent / "relabelled.py"
    plugin.write_text(PLUGIN, "utf-8")
    options = ["-s", "datasets.photos.type=Killed", "--plugin", str(plugin)]
    photos = file.parent / "photos"
    whole = (photos / "b" / "5.png").read_bytes()
    (photos / "b" / "5.png").write_bytes(b"no image")
    assert packed(file, "photos", "packed", *options).exit_code == 5
    (photos / "b" / "5.png").write_bytes(whole)
    if other == "name":
        (photos / "a" / "2.png").rename(photos / "a" / "3.png")
    if other == "labels":
        monkeypatch.setenv("RELABELLED", "")
    if other == "code":
        plugin.write_text(f"{PLUGIN}\n# other\n", "utf-8")
    options += {"quality": ["--quality", "50"], "order": [*CHOSEN]}.get(other, [])
    result = packed(file, "photos", "packed", *options)
    assert result.exit_code == 2, result.output
    assert "is half-packed with images of other files, labels, settings or code" in result.stderr
    for half in (file.parent / "packed").iterdir():
        half.unlink()
    assert packed(file, "photos", "packed", *options).exit_code == 0


def test_two_processes_do_not_pack_to_one_folder(file: Path) -> None:
    with filelock.FileLock(file.parent / ".packed.lock"):
        result = packed(file, "photos", "packed")
    assert result.exit_code == 6, result.output
    assert "another process is packing to" in result.stderr
    assert packed(file, "photos", "packed").exit_code == 0
    assert not list(file.parent.glob(".*.lock"))


def test_a_file_that_is_lost_ends_packing_though_bad_ones_are_skipped(file: Path) -> None:
    photo = file.parent / "photos" / "a" / "4.png"
    photo.rename(file.parent / "away.png")
    photo.symlink_to(file.parent / "mount" / "4.png")
    (file.parent / "photos" / "a" / "2.png").write_bytes(b"no image")
    command = ("photos", "packed", "--skip-bad")
    lost = packed(file, *command)
    assert lost.exit_code == 5, lost.output
    error, reason = lost.stderr.splitlines()[-2:]
    assert error.startswith("error: data set 'photos': sample 2 cannot be read: FileNotFoundError")
    assert error.count(str(photo)) == 1
    assert reason.startswith("the file system does not give this file, so packing ends here, with")
    assert not (file.parent / "packed" / "meta.json").exists()
    photo.unlink()
    (file.parent / "away.png").rename(photo)
    found = packed(file, *command)
    assert found.exit_code == 0, found.output
    assert "going on: 2 of 4 samples have been read already" in found.stderr
    assert "3 samples in 6 files, 0.0 MB; 1 sample skipped" in found.stdout


TO_FLOATS = "{type: ToDtype, params: {dtype: float32, scale: true}}"
NORMALISING = """\
from torch import nn

from distill import hookimpl


class Normalising(nn.Module):
    \"""Makes floats of bytes itself.\"""

    def __init__(self, features):
        super().__init__()
        self.head = nn.Linear(features, 2)

    def forward(self, images):
        return self.head(images.float().div(255).flatten(1))


@hookimpl
def distill_models():
    return {"Normalising": Normalising}
"""


@pytest.mark.parametrize("model", ["resnet18", "vit_b_32"])
@pytest.mark.parametrize("command", [["check", "--data"], ["run"]], ids=" ".join)
def test_bytes_that_reach_a_model_are_an_error_that_says_what_the_data_set_lacks(
    file: Path, command: list[str], model: str
) -> None:
    assert packed(file, "photos", "packed").exit_code == 0
    transforms = "[{type: Resize, params: {size: [32, 32]}}]"
    options = ["-s", f"models.m={{type: {model}, params: {{num_classes: 2}}}}"]
    if model == "vit_b_32":
        options = ["-s", f"models.m={{type: {model}, params: {{num_classes: 2, image_size: 32}}}}"]
    options += ["-s", f"datasets.small.transforms={transforms}"]
    result = CliRunner().invoke(main, [*command, str(file), *options])
    assert result.exit_code == 2, result.output
    kind = {"resnet18": "ResNet", "vit_b_32": "VisionTransformer"}[model]
    start, _, end = result.stderr.strip().splitlines()[-1].partition(" takes floats (")
    lacking = f"its images are bytes (uint8), and {kind} of stages.one.student"
    assert start == f"{file}:8:3: datasets.small: {lacking}"
    assert end.endswith(f"); end its transforms with {TO_FLOATS}")

    options[-1] = f"datasets.small.transforms={transforms[:-1]}, {TO_FLOATS}]"
    mended = CliRunner().invoke(main, ["check", "--data", str(file), *options])
    assert mended.exit_code == 0, mended.output


def test_models_that_make_floats_of_bytes_are_not_told_to_have_them_made(file: Path) -> None:
    assert packed(file, "photos", "packed").exit_code == 0
    plugin = file.parent / "normalising.py"
    plugin.write_text(NORMALISING, "utf-8")
    for features, code in ((3 * 8 * 8, 0), (5, 2)):
        model = f"models.m={{type: Normalising, params: {{features: {features}}}}}"
        options = ["--plugin", str(plugin), "-s", model]
        result = CliRunner().invoke(main, ["check", "--data", str(file), *options])
        assert result.exit_code == code, result.output
        assert "ToDtype" not in result.stderr
    assert "stages.one.student: Normalising fails on data set 'small'" in result.stderr
    assert "shapes cannot be multiplied" in result.stderr


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
