import pickle
from collections import Counter
from itertools import chain

import pytest
import torch

from distill import DataError, Sample, labels
from distill.builtin.subsets import RandomSplit, Subset
from distill.signature import bind

PARTS = {"train": 0.7, "val": 0.2, "test": 0.1}


class Points:
    """Item i is ``Sample(i, label)``."""

    def __init__(self, targets, classes=None):
        self.targets = list(targets)
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Sample(index, self.targets[index])


class Silent:
    """Labels only in its items, and no names."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, index % 2


def points(size=100, classes=10):
    return Points((number % classes for number in range(size)), [f"c{n}" for n in range(classes)])


def split(dataset, parts=PARTS, **params):
    return {name: RandomSplit(dataset, name, parts, **params).indices for name in parts}


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("size", [10, 99, 100, 1234])
@pytest.mark.parametrize(
    "parts", [PARTS, {"a": 0.5, "b": 0.5}, dict.fromkeys("abcdefghij", 0.1), {"all": 1}]
)
def test_parts_are_disjoint_together_everything_and_in_order(stratified, size, parts):
    found = split(points(size), parts, stratified=stratified)
    assert sorted(chain(*found.values())) == list(range(size))
    assert all(indices == sorted(indices) for indices in found.values())
    for name, fraction in parts.items():
        assert abs(len(found[name]) - fraction * size) <= 1


def test_fractions_below_one_leave_samples_out():
    found = split(points(), {"a": 0.25, "b": 0.25})
    assert [len(indices) for indices in found.values()] == [25, 25]
    assert not {*found["a"]} & {*found["b"]}


def test_whole_numbers_are_counts():
    assert [len(i) for i in split(points(), {"a": 90, "b": 1}).values()] == [90, 1]
    assert [len(i) for i in split(points(), {"a": 60, "b": 40}, stratified=True).values()] == [
        60,
        40,
    ]


@pytest.mark.parametrize("stratified", [False, True])
def test_a_split_depends_on_its_seed_and_on_no_other_random_state(stratified):
    torch.manual_seed(1)
    first = split(points(), stratified=stratified)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert split(points(), stratified=stratified) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert split(points(), seed=1, stratified=stratified) != first


def test_a_stratified_split_gives_each_part_its_share_of_every_class():
    found = split(points(1000), stratified=True)
    for name, fraction in PARTS.items():
        assert Counter(i % 10 for i in found[name]) == dict.fromkeys(range(10), 100 * fraction)
    uneven = Points([0] * 803 + [1] * 150 + [2] * 41 + [-1] * 6)
    for name, indices in split(uneven, stratified=True).items():
        for label, count in Counter(uneven.targets).items():
            got = sum(uneven.targets[i] == label for i in indices)
            assert abs(got - PARTS[name] * count) < 2


def test_a_stratified_split_is_random_within_classes():
    first, second = (split(points(1000), stratified=True, seed=s)["test"] for s in (0, 1))
    assert len({*first} & {*second}) < 30


def test_rare_classes_come_to_a_part_about_as_often_as_others():
    rare = Points([0] * 1000 + list(range(1, 201)))
    found = split(rare, {"train": 0.9, "val": 0.1}, stratified=True)["val"]
    assert 8 <= sum(rare.targets[i] > 0 for i in found) <= 35


@pytest.mark.parametrize(
    ("take", "parts", "said"),
    [
        ("tset", {"train": 0.5, "test": 0.5}, "no part 'tset'; parts: train, test"),
        ("a", {"a": -0.1}, "part 'a' is -0.1; a part cannot be negative"),
        ("a", {"a": float("nan")}, "part 'a' is nan"),
        ("a", {"a": 0.6, "b": 0.5}, "parts ask for 1.1 in all and there is only the whole"),
        ("a", {"a": 60, "b": 50}, "parts ask for 110 in all and there is only 100 samples"),
        ("a", {"a": 0.5, "b": 0.001}, "part 'b' is 0.001 of 100 samples: it is empty"),
        ("a", {"a": 50, "b": 0}, "part 'b' is 0 of 100 samples: it is empty"),
    ],
)
def test_parts_that_cannot_be_are_an_error_in_words(take, parts, said):
    with pytest.raises(ValueError, match=said):
        RandomSplit(points(), take, parts)


def test_fractions_may_miss_one_by_rounding():
    third = 1 / 3 + 1e-10
    found = split(points(), {"a": third, "b": third, "c": third})
    assert sorted(chain(*found.values())) == list(range(100))


@pytest.mark.parametrize(
    "part",
    [RandomSplit(points(), "val", PARTS), Subset(points(), count=20)],
    ids=["RandomSplit", "Subset"],
)
def test_a_part_passes_items_through_and_keeps_what_the_whole_tells(part):
    assert len(part) == 20
    assert [item.input for item in part] == part.indices
    assert part[3] == part.dataset[part.indices[3]]
    assert part.classes == part.dataset.classes
    assert part.targets == [i % 10 for i in part.indices] == labels(part)
    assert pickle.loads(pickle.dumps(part))[3] == part[3]


def test_labels_that_must_be_read_are_only_read_where_they_are_needed():
    part = Subset(Silent(), count=3)
    assert not hasattr(part, "targets")
    assert part.classes is None
    assert labels(part) == [i % 2 for i in part.indices]
    per_class = Subset(Silent(), per_class=2)
    assert Counter(i % 2 for i in per_class.indices) == {0: 2, 1: 2}
    unlabelled = [("a", None), ("b", None)]
    assert len(Subset(unlabelled, fraction=0.5)) == 1
    with pytest.raises(DataError, match="list has no class labels"):
        Subset(unlabelled, per_class=1)


@pytest.mark.parametrize(("fraction", "size"), [(0.25, 25), (0.254, 25), (0.255, 26), (1, 100)])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_fraction_is_rounded_to_whole_samples_in_order(fraction, size, stratified):
    found = Subset(points(), fraction=fraction, stratified=stratified).indices
    assert len(found) == len({*found}) == size
    assert found == sorted(found)
    if stratified:
        of_class = Counter(i % 10 for i in found)
        assert all(abs(of_class[label] - size / 10) < 1 for label in range(10))


def test_the_larger_subset_holds_the_smaller():
    for params in ({"count": 10}, {"fraction": 0.1}, {"per_class": 1}):
        ((name, few),) = params.items()
        small, large = Subset(points(), **params), Subset(points(), **{name: 3 * few})
        assert {*small.indices} < {*large.indices}


def test_per_class_takes_so_many_of_each_and_none_without_a_label():
    dataset = Points([0] * 50 + [1] * 3 + [-1] * 20)
    found = Subset(dataset, per_class=3)
    assert Counter(found.targets) == {0: 3, 1: 3}
    assert found.indices != Subset(dataset, per_class=3, seed=1).indices
    with pytest.raises(ValueError, match="class 1 has 3 samples, fewer than per_class = 4"):
        Subset(dataset, per_class=4)
    dataset.classes = ["cat", "dog"]
    with pytest.raises(ValueError, match="class 'dog' has 3 samples, fewer than per_class = 4"):
        Subset(dataset, per_class=4)


def test_classes_are_kept_by_label_or_name():
    found = Subset(points(), classes=["c7", 2])
    assert found.indices == [i for i in range(100) if i % 10 in (2, 7)]
    assert set(found.targets) == {2, 7}
    assert Counter(Subset(points(), per_class=4, classes=[2, 7]).targets) == {2: 4, 7: 4}
    assert len(Subset(points(), fraction=0.5, classes=[2, 7])) == 10
    assert Subset(points(), indices=[12, 3, 2], classes=[2]).indices == [12, 2]


def test_indices_are_taken_as_given():
    assert Subset(points(), indices=[5, 1, 5]).indices == [5, 1, 5]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "exactly one of fraction, per_class, count, indices says how many, got none"),
        ({"fraction": 0.5, "count": 3}, "exactly one of .*, got fraction and count"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.1}, "fraction must be above 0 and at most 1, got 1.1"),
        ({"fraction": 0.001}, "no samples are left"),
        ({"count": 0}, "count is 0: there are 100 samples"),
        ({"count": 101}, "count is 101: there are 100 samples"),
        ({"count": 21, "classes": [1, 2]}, "count is 21: there are 20 samples"),
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"per_class": 1, "stratified": True}, "stratified goes with fraction or count"),
        ({"classes": [1], "stratified": True}, "stratified goes with fraction or count"),
        ({"indices": [0, 100]}, "there is no sample 100; the data set has 100"),
        ({"indices": [-1]}, "there is no sample -1"),
        ({"indices": []}, "no samples are left"),
        ({"classes": ["cat"]}, "there is no class 'cat'; classes: c0, c1"),
        ({"classes": [0, 10]}, "class 10 has no samples"),
    ],
)
def test_what_cannot_be_chosen_is_an_error_in_words(params, said):
    with pytest.raises(ValueError, match=said):
        Subset(points(), **params)


def test_a_subset_does_not_touch_the_random_state():
    before = torch.get_rng_state()
    for params in ({"count": 10}, {"fraction": 0.5, "stratified": True}, {"per_class": 2}):
        Subset(points(), **params)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_come_from_a_file():
    binding = bind(RandomSplit, {"take": "a", "parts": {"a": 0.5}, "seed": 1}, provided=1)
    assert binding.problems == []
    assert len(RandomSplit(points(), **binding.arguments)) == 50
    binding = bind(Subset, {"per_class": 1, "classes": ["c1", 2]}, provided=1)
    assert binding.problems == []
    assert sorted(Subset(points(), **binding.arguments).targets) == [1, 2]
    assert bind(Subset, {"fraction": "half"}, provided=1).problems != []
