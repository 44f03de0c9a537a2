import numpy as np
import pytest
import torch
from torch.utils.data import Subset as TorchSubset

from distill import DataError, Sample, labels


class Unread:
    """Tells its labels by an attribute and fails when it is read."""

    def __init__(self, size=3, **attributes):
        self.size = size
        vars(self).update(attributes)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        raise AssertionError("an input was loaded")


@pytest.mark.parametrize("name", ["targets", "labels", "_labels", "y"])
@pytest.mark.parametrize(
    "values",
    [
        [2, 0, 1],
        (2, 0, 1),
        torch.tensor([2, 0, 1]),
        np.array([2, 0, 1], dtype=np.uint8),
        [torch.tensor(2), np.int64(0), 1],
    ],
    ids=["list", "tuple", "tensor", "array", "mixed"],
)
def test_an_attribute_tells_the_labels_as_plain_ints(name, values):
    found = labels(Unread(**{name: values}))
    assert found == [2, 0, 1]
    assert [type(label) for label in found] == [int, int, int]


def test_the_labels_of_a_part_come_from_the_whole():
    whole = Unread(targets=[5, 6, 7])
    assert labels(TorchSubset(whole, [2, 0])) == [7, 5]
    assert labels(TorchSubset(TorchSubset(whole, [2, 0, 1]), [1, 2])) == [5, 6]
    part = TorchSubset(whole, torch.tensor([1, 1]))
    assert labels(part) == [6, 6]


class Items:
    """Gives the items it was made of."""

    def __init__(self, *items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_without_an_attribute_every_item_is_read():
    items = Items(("a", 3), Sample("b", 1), ("c", torch.tensor(2)), Sample("d", np.int64(0)))
    assert labels(items) == [3, 1, 2, 0]
    assert labels(TorchSubset(items, [3, 0])) == [0, 3]


@pytest.mark.parametrize(
    "misleading",
    [
        {"targets": [7, 7]},
        {"targets": ["a.xml", "b.xml", "c.xml"]},
        {"targets": [[1], [2], [3]]},
        {"targets": [0.0, 1.0, 2.0]},
        {"targets": None},
        {"targets": [7, 7, 7], "target_transform": lambda label: label - 6},
    ],
    ids=["other length", "texts", "lists", "floats", "none", "transformed later"],
)
def test_an_attribute_that_holds_no_label_a_sample_is_passed_over(misleading):
    assert labels(Items(("a", 1), ("b", 0), ("c", 1), **misleading)) == [1, 0, 1]


def test_the_next_attribute_is_asked():
    assert labels(Unread(targets=["a", "b", "c"], y=[1, 2, 3])) == [1, 2, 3]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (None, "got none"),
        (0.5, r"got 0\.5"),
        (True, "got True"),
        ("cat", "got 'cat'"),
        (torch.tensor([1]), "got a list"),
        ({"boxes": []}, "got a dict"),
    ],
)
def test_a_target_that_is_no_whole_number_is_an_error_in_words(target, said):
    with pytest.raises(DataError, match=f"^Items has no class labels: .*sample 1 must.*{said}$"):
        labels(Items(("a", 1), ("b", target)))


def test_an_item_that_cannot_be_read_is_an_error_in_words():
    with pytest.raises(DataError, match="Unread: sample 0 cannot be read: AssertionError: an in"):
        labels(Unread())
    with pytest.raises(DataError, match="Items: sample 0 cannot be read: IndexError"):
        labels(Items(("a",)))


def test_it_can_be_asked_not_to_read():
    assert labels(Unread(targets=[1, 2, 3]), read=False) == [1, 2, 3]
    with pytest.raises(DataError, match="Unread does not tell its labels without being read"):
        labels(Unread(), read=False)
