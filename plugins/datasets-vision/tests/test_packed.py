"""Data sets in few files."""

import errno
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
        pack(tmp_path / "missing", dataset=Pictures(targets=[0, None, 1, 1, 1]))


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
    for name, odd, message in (
        (
            "floats",
            Sample(torch.zeros(3, 2, 2), 0),
            "TypeError: images must be PIL images or uint8",
        ),
        ("extras", Sample(expected(1), 0, extras={"path": "a"}), "TypeError: it has more than a"),
    ):
        seen = []
        with pytest.raises(DataError, match=f"^sample 1 cannot be packed: {message}"):
            packer([fine, odd, fine], tmp_path / name, {}, seen.append, lambda bad: None)
        assert seen == [1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", [(), (0,)], ids=["first", "after a bad one"])
def test_samples_of_another_kind_leave_no_folder_where_none_was_packed(tmp_path, bad, workers):
    floats = Damaged(bad, make=lambda image: torch.zeros(3, 2, 2))
    refusal = (
        "cannot be packed: TypeError: images must be PIL images or uint8 tensors (1 or 3, H, W), "
        "this is a tensor of torch.float32 (3, 2, 2)"
    )
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(DataError) as caught:
            pack(tmp_path / name, dataset=floats, workers=workers)
        assert str(caught.value) == f"sample {len(bad)} {refusal}"
    assert [(path.name, [*path.iterdir()]) for path in tmp_path.iterdir()] == [("empty", [])]
    pack(tmp_path / "new", workers=workers)


def test_what_is_packed_stays_where_a_later_sample_is_of_another_kind(tmp_path):
    fine, odd = Sample(expected(0), 0), Sample(torch.zeros(3, 2, 2), 0)
    for _ in range(2):  # the second time it goes on from the first sample
        with pytest.raises(DataError, match="sample 1 cannot be packed: TypeError"):
            pack(tmp_path, dataset=[fine, odd])
        assert contents(tmp_path).keys() == {"images.bin", "packing.jsonl"}
    assert contents(tmp_path)["images.bin"] == expected(0).tobytes()


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


class Stopping(Pictures):
    """Is stopped at a sample, as by Ctrl+C, and remembers which ones were read."""

    def __init__(self, stop_at=None, **options):
        super().__init__(**{"targets": np.float32([[0.1, n] for n in range(5)]), **options})
        self.stop_at, self.read = stop_at, []

    def __getitem__(self, index):
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return super().__getitem__(index)


def stop(folder, **options):
    with pytest.raises(KeyboardInterrupt):
        pack(folder, dataset=Stopping(stop_at=3), **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_packing_goes_on_from_the_last_image_to_the_bytes_of_one_that_was_not_stopped(
    tmp_path, encoding
):
    pack(tmp_path / "whole", encoding, Stopping())
    stop(tmp_path / "two", encoding=encoding)
    with pytest.raises(FileNotFoundError, match="it was not packed to its end"):
        Packed(str(tmp_path / "two"))
    dataset, seen = Stopping(), []
    packer = distill_packers()[encoding](size=32, quality=90, workers=0)
    packer(dataset, tmp_path / "two", {"from": "tests"}, seen.append)
    assert dataset.read == [0, 3, 4]  # the first, to see whether it is the same
    assert seen == [3, 4, 5]
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")
    assert "packing.jsonl" not in contents(tmp_path / "two")


def test_whatever_a_crash_leaves_of_the_files_the_bytes_are_the_same_in_the_end(tmp_path):
    pack(tmp_path / "whole", dataset=Stopping())
    stop(tmp_path / "stopped")
    chance, kept = random.Random(0), set()
    for number in range(40):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "stopped", folder)
        file = folder / ("images.bin", "packing.jsonl")[number % 2]
        content = file.read_bytes()
        place = chance.randrange(len(content))
        # What was not yet on the disk is missing, or zeros of its length.
        lost = (b"", bytes(len(content) - place))[number // 2 % 2]
        file.write_bytes(content[:place] + lost)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, dataset=(again := Stopping(stop_at=4)))
        kept.add(4 - len(set(again.read)))
        pack(folder, dataset=(last := Stopping()))
        assert last.read == [0, 4]
        assert contents(folder) == contents(tmp_path / "whole")
    assert kept >= {0, 1}


WHITE = Image.new("RGB", (20, 20), "white")
OTHER = "is half-packed with images of other files, labels, settings or code; empty it"


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ({}, {"size": 16}),
        ({}, {"encoding": "jpeg"}),
        ({"make": lambda image: WHITE}, {}),
        ({"targets": (0, 1, 1, 0, 1)}, {}),
    ],
    ids=["size", "encoding", "images", "targets"],
)
def test_what_is_half_packed_of_something_else_is_refused_and_stays(tmp_path, dataset, options):
    stop(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=OTHER):
        pack(tmp_path, dataset=Stopping(**dataset), **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("samples", "size", "source"), [(4, 32, "tests"), (5, 28, "tests"), (5, 32, "others")]
)
def test_settings_samples_and_source_count_where_the_first_image_is_the_same(
    tmp_path, samples, size, source
):
    def stopping(done):
        if done == 3:
            raise KeyboardInterrupt

    whole = [Stopping()[n] for n in (3, 4, 0, 1, 2)]
    with pytest.raises(KeyboardInterrupt):
        distill_packers()["raw"](size=32)(whole, tmp_path, {"from": "tests"}, stopping)
    other = [whole[n] for n in (0, 2, 1, 4, 3)][:samples]
    with pytest.raises(FileExistsError, match=OTHER):
        distill_packers()["raw"](size=size)(other, tmp_path, {"from": source})


def test_where_nothing_is_whole_packing_begins_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "stopped", dataset=Stopping(stop_at=0))
    for name in ("stopped", "alone"):
        pack(tmp_path / name, dataset=Stopping(), size=16)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "alone")


def test_a_bad_sample_is_known_again_whatever_its_error_says(tmp_path):
    class Nameless(Stopping):
        def __getitem__(self, index):
            if index == 0:
                raise OSError(f"cannot identify image file {object()}")
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, dataset=Nameless(stop_at=3))
    seen = []
    packer = distill_packers()["raw"](size=32, quality=90, workers=0)
    packer(Nameless(), tmp_path, {"from": "tests"}, seen.append, lambda bad: None)
    assert seen == [3, 4, 5]


def test_bad_samples_are_looked_at_again_and_those_that_were_repaired_are_packed(tmp_path):
    for name in ("repaired", "bad"):
        with pytest.raises(DataError, match="picture 3 is truncated"):
            pack(tmp_path / name, dataset=Damaged({1, 3}))
    packer = distill_packers()["raw"](size=32, quality=90, workers=0)
    packer(Damaged({3}), tmp_path / "repaired", {"from": "tests"}, on_bad=lambda bad: None)
    packer(Damaged({3}), tmp_path / "alone", {"from": "tests"}, on_bad=lambda bad: None)
    assert contents(tmp_path / "repaired") == contents(tmp_path / "alone")
    seen = []
    packer(Damaged({1, 3}), tmp_path / "bad", {"from": "tests"}, seen.append, lambda bad: None)
    assert (seen, len(Packed(str(tmp_path / "bad")))) == ([5], 3)


class Failing(Pictures):
    """Raises an error for one picture, as a data set does that tells it in words of its own."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __getitem__(self, index):
        if index == 3:
            try:
                raise self.error
            except OSError as error:
                raise RuntimeError("picture 3") from error
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("code", ["ENOENT", "EACCES", "EIO", "ESTALE", "ENOTCONN"])
def test_a_file_that_is_not_given_ends_packing_and_is_never_left_out(tmp_path, code, workers):
    lost = Failing(OSError(getattr(errno, code), "gone"))
    packer = distill_packers()["raw"](size=32, quality=90, workers=workers)
    told, seen = [], []
    with pytest.raises(
        DataError, match=r"^sample 3 cannot be packed: .* picture 3\nthe file system"
    ):
        packer(lost, tmp_path, {}, seen.append, told.append)
    assert (told, seen) == ([], [1, 2, 3])
    packer(Pictures(), tmp_path, {}, seen.append)
    assert (seen, len(Packed(str(tmp_path)))) == ([1, 2, 3, 3, 4, 5], 5)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("4.png"), RuntimeError("[Errno 2] No such file or directory: '4.png'")],
    ids=["no number", "no OSError"],
)
def test_a_file_that_is_not_given_is_known_by_its_error_without_a_number_too(tmp_path, error):
    class Hiding(Pictures):
        def __getitem__(self, index):
            try:
                raise error
            except type(error):
                raise ValueError("bad image")  # noqa: B904

    with pytest.raises(DataError, match=r"bad image\nthe file system does not give this file"):
        distill_packers()["raw"](size=32)(Hiding(), tmp_path, {})


def test_bytes_that_are_no_image_are_bad_whatever_a_decoder_makes_of_them(tmp_path):
    packer = distill_packers()["raw"](size=32, quality=90, workers=0)
    for number, error in enumerate((OSError("truncated"), OSError(errno.EINVAL, "seek"))):
        told = []
        packer(Failing(error), tmp_path / str(number), {}, on_bad=told.append)
        assert told == [{3: "sample 3 cannot be packed: RuntimeError: picture 3"}]


def test_targets_that_are_no_numbers_end_packing_at_once(tmp_path):
    dataset = Stopping(targets=["cat"] * 5)
    message = "^sample 0 cannot be packed: TypeError: targets must be numbers .*, not str$"
    with pytest.raises(DataError, match=message):
        pack(tmp_path, dataset=dataset)
    assert dataset.read == [0]
