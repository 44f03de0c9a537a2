"""Data sets in few files."""

import io
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from distill import DataError, Sample, labels
from distill_datasets_vision import Packed, distill_packers

SIZES = [(61, 40), (40, 60), (30, 30), (16, 20), (41, 77)]


class Pictures:
    """Smooth pictures, so that JPEG changes them little."""

    classes = ("a", "b")

    def __init__(self, targets=(0, 1, 1, 0, 1), make=lambda image: image, fail_at=None):
        self.targets, self.make, self.fail_at = targets, make, fail_at

    def __len__(self):
        return len(SIZES)

    def picture(self, index):
        generator = np.random.default_rng(index)
        small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(small).resize(SIZES[index], Image.Resampling.BICUBIC)

    def __getitem__(self, index):
        if index == self.fail_at:
            raise DataError("data set 'photos': sample 3 cannot be read: OSError: damaged")
        target = None if self.targets is None else self.targets[index]
        return Sample(self.make(self.picture(index)), target)


def pack(folder, encoding="raw", dataset=None, **options):
    options = {"size": 32, "quality": 90, "workers": 0, **options}
    packer = distill_packers()[encoding](**options)
    return packer(dataset or Pictures(), folder, {"from": "tests"})


def expected(index, size=32):
    image = Pictures().picture(index)
    return F.resize(image, size) if min(image.size) > size else image


@pytest.mark.parametrize("workers", [0, 2])
def test_raw_pixels_are_those_of_resize_and_smaller_images_stay(tmp_path, workers):
    written = pack(tmp_path / "packed", workers=workers)
    assert written == f"{{type: Packed, params: {{root: {tmp_path / 'packed'}}}}}"
    packed = Packed(str(tmp_path / "packed"))
    assert (len(packed), packed.classes, labels(packed)) == (5, ["a", "b"], [0, 1, 1, 0, 1])
    for index in range(5):
        image, target = packed[index]
        assert torch.equal(image, v2.ToImage()(expected(index)))
        assert target == Pictures().targets[index]
    assert packed[-1][0].shape == packed[4][0].shape
    assert [packed[index][0].shape[1:] for index in (2, 3)] == [(30, 30), (20, 16)]


def test_jpegs_decode_to_what_pil_decodes(tmp_path):
    pack(tmp_path, "jpeg", quality=80)
    packed = Packed(str(tmp_path))
    for index in range(5):
        buffer = io.BytesIO()
        expected(index).save(buffer, "JPEG", quality=80)
        image, _ = packed[index]
        assert torch.equal(image, v2.ToImage()(Image.open(buffer)))
        assert (image.float() - v2.ToImage()(expected(index)).float()).abs().mean() < 12
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checks.npy",
        "images.bin",
        "meta.json",
        "offsets.npy",
        "shapes.npy",
        "targets.npy",
    ]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["images"], meta["quality"], meta["source"]) == (5, 80, {"from": "tests"})


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_grey_and_other_images_and_tensors_are_packed(tmp_path, encoding):
    kinds = {
        "grey": (lambda image: image.convert("L"), 1),
        "palette": (lambda image: image.convert("P"), 3),
        "tensor": (lambda image: v2.ToImage()(image), 3),
    }
    for name, (make, channels) in kinds.items():
        pack(tmp_path / name, encoding, Pictures(make=make))
        image, _ = Packed(str(tmp_path / name))[0]
        assert (image.dtype, image.shape) == (torch.uint8, (channels, 32, 48))


def test_targets_may_be_missing_or_arrays(tmp_path):
    pack(tmp_path / "none", dataset=Pictures(targets=None))
    sample = Packed(str(tmp_path / "none"))[1]
    assert (type(sample), sample.target) == (Sample, None)
    soft = torch.eye(5)
    pack(tmp_path / "soft", dataset=Pictures(targets=soft))
    _, target = Packed(str(tmp_path / "soft"))[1]
    assert torch.equal(target, soft[1])
    for targets in ([{"boxes": 1}] * 5, [torch.zeros(n) for n in range(5)]):
        with pytest.raises(DataError, match="targets must be numbers or arrays of one shape"):
            pack(tmp_path / "odd", dataset=Pictures(targets=targets))
    with pytest.raises(DataError, match="some samples have a target and some have none"):
        pack(tmp_path / "odd", dataset=Pictures(targets=[0, None, 1, 1, 1]))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_packed_is_named(tmp_path, workers):
    with pytest.raises(DataError, match=r"^data set 'photos': sample 3 cannot be read"):
        pack(tmp_path, dataset=Pictures(fail_at=3), workers=workers)
    with pytest.raises(DataError, match=r"sample 0 cannot be packed: TypeError: .* torch.float32"):
        pack(tmp_path, dataset=Pictures(make=lambda image: torch.zeros(3, 2, 2)))
    with pytest.raises(DataError, match=r"sample 0 cannot be packed: .* no image but str"):
        pack(tmp_path, dataset=Pictures(make=str))


class Damaged(Pictures):
    """Some of the pictures cannot be read, and one is longer than a JPEG may be."""

    def __init__(self, bad, long=None, **options):
        super().__init__(**options)
        self.bad, self.long = bad, long

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"picture {index} is truncated")
        if index == self.long:
            return Sample(Image.new("L", (70_000, 1)), 0)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_samples_are_named_in_the_end_and_nothing_is_finished(tmp_path, workers):
    with pytest.raises(DataError) as caught:
        pack(tmp_path, "jpeg", Damaged({1, 3}, long=4), workers=workers)
    first, second, third = str(caught.value).splitlines()
    assert first == "sample 1 cannot be packed: OSError: picture 1 is truncated"
    assert second == "sample 3 cannot be packed: OSError: picture 3 is truncated"
    assert third.startswith("sample 4 cannot be packed: OSError: ")
    with pytest.raises(FileNotFoundError, match="it was not packed to its end"):
        Packed(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_where_bad_samples_are_taken_the_others_keep_order_and_targets(tmp_path, workers):
    told, seen = [], []
    packer = distill_packers()["raw"](size=32, quality=90, workers=workers)
    dataset = Damaged({0, 3}, targets=(5, 6, 7, 8, 9))
    packer(dataset, tmp_path, {}, seen.append, told.append)
    reasons = {n: f"sample {n} cannot be packed: OSError: picture {n} is truncated" for n in (0, 3)}
    assert (told, seen) == ([reasons], [1, 2, 3, 4, 5])
    packed = Packed(str(tmp_path))
    assert (len(packed), packed.classes, labels(packed)) == (3, ["a", "b"], [6, 7, 9])
    for index, original in enumerate((1, 2, 4)):
        assert torch.equal(packed[index][0], v2.ToImage()(expected(original)))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["images"] == 3
    assert meta["skipped"] == {str(index): why for index, why in reasons.items()}


def test_a_data_set_without_a_sample_to_pack_is_refused(tmp_path):
    packer = distill_packers()["raw"](size=32, quality=90, workers=0)
    with pytest.raises(DataError, match="there is no sample to pack"):
        packer(Damaged(range(5)), tmp_path, {}, on_bad=lambda bad: None)
    assert not (tmp_path / "meta.json").exists()


def test_samples_of_another_kind_end_packing_at_once_and_are_not_left_out(tmp_path):
    packer = distill_packers()["raw"](size=32, quality=90, workers=0)
    fine = Sample(expected(0), 0)
    for odd, message in (
        (Sample(torch.zeros(3, 2, 2), 0), "TypeError: images must be PIL images or uint8"),
        (Sample(expected(1), 0, extras={"path": "a"}), "TypeError: it has more than a"),
    ):
        seen = []
        with pytest.raises(DataError, match=f"^sample 1 cannot be packed: {message}"):
            packer([fine, odd, fine], tmp_path, {}, seen.append, lambda bad: None)
        assert seen == [1]


def test_loader_workers_read_what_this_process_reads(tmp_path):
    pack(tmp_path)
    packed = Packed(str(tmp_path))
    copied = pickle.loads(pickle.dumps(packed))
    assert len(pickle.dumps(packed)) < 5000
    for index, (image, _) in enumerate(DataLoader(packed, batch_size=None, num_workers=1)):
        assert torch.equal(image, packed[index][0])
        assert torch.equal(image, copied[index][0])


def test_writing_into_an_image_leaves_the_file_as_it_is(tmp_path):
    pack(tmp_path)
    packed = Packed(str(tmp_path))
    before = packed[0][0].clone()
    packed[0][0].zero_()
    assert torch.equal(packed[0][0], before)


def test_images_go_through_the_usual_transforms(tmp_path):
    pack(tmp_path)
    steps = [v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    for image, _ in Packed(str(tmp_path)):
        assert v2.Compose(steps)(image).shape == (3, 8, 8)


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_every_flipped_bit_and_every_truncation_is_found(tmp_path, encoding):
    pack(tmp_path / "whole", encoding)
    chance = random.Random(0)
    files = sorted(file.name for file in (tmp_path / "whole").iterdir() if file.suffix != ".json")
    for number in range(40):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        file = folder / files[number % len(files)]
        content = bytearray(file.read_bytes())
        place = chance.randrange(len(content))
        if number % 3:
            content[place] ^= 1 << chance.randrange(8)
        else:
            content = content[:place]
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"is damaged|pack it again"):
            list(Packed(str(folder)))


def test_what_is_missing_or_unfinished_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"but there is none; write it with `distill data"):
        Packed(str(tmp_path / "nowhere"))
    pack(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="it was not packed to its end"):
        Packed(str(tmp_path))
    pack(tmp_path)  # over what was not finished
    with pytest.raises(FileExistsError, match="is there already, with a packed data set"):
        pack(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        Packed(str(tmp_path))
    other = {"kind": "distill packed images", "version": 2, "encoding": "raw"}
    (tmp_path / "meta.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"another version or kind than"):
        Packed(str(tmp_path))
    for name in ("offsets.npy", "images.bin"):
        folder = tmp_path / f"without {name}"
        pack(folder)
        (folder / name).unlink()
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            Packed(str(folder))
