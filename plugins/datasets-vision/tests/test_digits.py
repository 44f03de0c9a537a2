import hashlib
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from distill_datasets_vision import Digits, DigitsStudent, DigitsTeacher

SPLITS = ("train", "validation", "test")
# Of scikit-learn's load_digits: images and target as uint8, one after the other.
SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def items_of(digits):
    return torch.stack([image for image, _ in digits]), torch.tensor([y for _, y in digits])


def test_digits_are_scikit_learns_byte_for_byte():
    with np.load(files("distill_datasets_vision") / "data" / "digits.npz") as arrays:
        content = arrays["images"].tobytes() + arrays["labels"].tobytes()
    assert hashlib.sha256(content).hexdigest() == SHA256


def test_digits_come_with_source_and_licence():
    text = (files("distill_datasets_vision") / "data" / "DIGITS.txt").read_text()
    assert "CC BY 4.0" in text
    assert "10.24432/C50P49" in text


def test_splits_have_the_documented_sizes():
    assert [len(Digits(split)) for split in SPLITS] == [1047, 250, 500]


def test_held_out_splits_have_every_class_equally_often():
    for split, count in (("validation", 25), ("test", 50)):
        _, labels = items_of(Digits(split))
        assert torch.bincount(labels).tolist() == [count] * 10
    _, labels = items_of(Digits("train"))
    assert torch.bincount(labels).tolist() == [103, 107, 102, 108, 106, 107, 106, 104, 99, 105]


def test_splits_share_no_image_and_leave_none_out():
    with np.load(files("distill_datasets_vision") / "data" / "digits.npz") as arrays:
        everything = sorted(image.tobytes() for image in arrays["images"])
    parts = [items_of(Digits(split))[0] for split in SPLITS]
    seen = [(i * 16).to(torch.uint8).numpy().tobytes() for part in parts for i in part]
    assert sorted(seen) == everything


def test_splits_stay_what_they_are():
    digests = []
    for split in SPLITS:
        images, labels = items_of(Digits(split))
        content = (images * 16).to(torch.uint8).numpy().tobytes() + bytes(labels.tolist())
        digests.append(hashlib.sha256(content).hexdigest()[:16])
    assert digests == ["8779ef76b62e5ef1", "c95280687e70e596", "1ad1c8eafcad914d"]


def test_an_item_is_an_image_between_zero_and_one_and_its_label():
    images, labels = items_of(Digits("train"))
    assert images.shape == (1047, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert type(Digits("train")[0][1]) is int
    assert Digits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert sorted(set(labels.tolist())) == list(range(10))


def test_changing_an_item_in_place_leaves_the_data_set_alone():
    digits = Digits("test")
    digits[0][0].zero_()
    assert digits[0][0].sum() > 0


def test_few_labels_are_the_first_of_every_class():
    few, all_of_them = Digits("train", labels_per_class=20), Digits("train")
    for label in range(10):
        kept = [image for image, y in few if y == label]
        first = [image for image, y in all_of_them if y == label][:20]
        assert torch.equal(torch.stack(kept), torch.stack(first))
    assert len(few) == 200


@pytest.mark.parametrize("count", [0, -1, 100])
def test_more_labels_than_a_class_has_or_none_are_refused(count):
    with pytest.raises(ValueError, match=f"labels_per_class is {count}: .*between 1 and 99"):
        Digits("train", labels_per_class=count)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no split 'val': one of train, validation, test"):
        Digits("val")


def test_digits_reach_worker_processes():
    images, labels = next(iter(DataLoader(Digits("test"), batch_size=500, num_workers=1)))
    expected = items_of(Digits("test"))
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


@pytest.mark.parametrize(("model", "size"), [(DigitsTeacher, 58_474), (DigitsStudent, 6_138)])
def test_digits_models_have_the_documented_size(model, size):
    assert sum(p.numel() for p in model().parameters()) == size


def test_digits_models_have_the_documented_shapes():
    shapes = {}
    for model, width in ((DigitsTeacher(4, num_classes=7), 4), (DigitsStudent(4, 7), 4)):
        for name in ("block1", "block2", "block3", "flatten", "fc"):
            if hasattr(model, name):
                model.get_submodule(name).register_forward_hook(
                    lambda _m, _i, output, name=name: shapes.__setitem__(name, output.shape[1:])
                )
        model(torch.rand(2, 1, 8, 8))
        assert shapes["block1"] == (width, 8, 8)
        assert shapes["block2"] == (2 * width, 4, 4)
        assert shapes["flatten"] == (8 * width,)
        assert shapes["fc"] == (7,)
    assert shapes["block3"] == (8, 4, 4)


def test_a_captured_activation_is_not_changed_by_what_follows():
    seen = []
    for model in (DigitsTeacher(4), DigitsStudent(4)):
        model.block1[1].register_forward_hook(lambda _m, _i, o: seen.append((o, o.clone())))
        model(torch.rand(2, 1, 8, 8))
    assert len(seen) == 2
    assert all(torch.equal(kept, copy) for kept, copy in seen)


def test_the_teacher_learns_the_digits_in_seconds(one_thread):
    torch.manual_seed(0)
    images, labels = items_of(Digits("train"))
    model = DigitsTeacher(width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(8):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    model.eval()
    images, labels = items_of(Digits("test"))
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
