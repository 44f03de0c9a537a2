from collections import Counter

import pytest
import torch

from distill import DataError, builtin
from distill.builtin.samplers import (
    ClassBalancedSampler,
    ClassesPerBatchSampler,
    RandomSampler,
    RepeatedAugmentationSampler,
    SequentialSampler,
)
from distill.signature import bind


class Labelled:
    def __init__(self, targets):
        self.targets = list(targets)

    def __len__(self):
        return len(self.targets)


def dataset(size=20, classes=4):
    return Labelled(number % classes for number in range(size))


def drawn(sampler, seed=0):
    torch.manual_seed(seed)
    return list(sampler)


SAMPLERS = {
    "SequentialSampler": {},
    "RandomSampler": {"num_samples": 50},
    "RepeatedAugmentationSampler": {"repeats": 2},
    "ClassBalancedSampler": {"num_samples": 33},
}


def make(name):
    return builtin.distill_samplers()[name](dataset(), **SAMPLERS[name])


def test_the_hooks_offer_them_by_name():
    assert set(builtin.distill_samplers()) == set(SAMPLERS)
    assert set(builtin.distill_batch_samplers()) == {"ClassesPerBatchSampler"}
    for offered in (builtin.distill_samplers(), builtin.distill_batch_samplers()):
        assert all(name == factory.__name__ for name, factory in offered.items())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_gives_as_many_ints_as_its_length(name):
    sampler = make(name)
    indices = drawn(sampler)
    assert len(indices) == len(sampler)
    assert all(type(index) is int and 0 <= index < 20 for index in indices)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_is_a_function_of_torch_s_seed_alone(name):
    sampler = make(name)
    first = drawn(sampler)
    other = drawn(sampler, seed=1)
    assert drawn(sampler) == first
    assert drawn(make(name)) == first
    assert (other == first) == (name == "SequentialSampler")


@pytest.mark.parametrize("name", SAMPLERS)
def test_parameters_from_a_file_are_checked(name):
    factory = builtin.distill_samplers()[name]
    assert bind(factory, SAMPLERS[name], provided=1).problems == []
    assert bind(factory, {"generator": 1}, provided=1).problems != []


def test_sequential_is_the_order_of_the_data_set():
    assert list(SequentialSampler(dataset())) == list(range(20))


def test_random_is_a_permutation_and_more_is_one_after_the_other():
    assert sorted(drawn(RandomSampler(dataset()))) == list(range(20))
    indices = drawn(RandomSampler(dataset(), num_samples=50))
    assert sorted(indices[:20]) == sorted(indices[20:40]) == list(range(20))
    assert len({*indices[40:]}) == 10
    with_replacement = drawn(RandomSampler(dataset(), replacement=True))
    assert len({*with_replacement}) < len(with_replacement) == 20
    with pytest.raises(ValueError, match="num_samples"):
        RandomSampler(dataset(), num_samples=0)


@pytest.mark.parametrize(("repeats", "length"), [(1, 20), (3, 20), (3, 60), (4, 10), (7, 1)])
def test_repeated_augmentation_repeats_a_permutation_in_a_row(repeats, length):
    sampler = RepeatedAugmentationSampler(dataset(), repeats, length)
    indices = drawn(sampler)
    assert len(indices) == len(sampler) == length
    runs = [indices[start : start + repeats] for start in range(0, length, repeats)]
    assert all(len({*run}) == 1 for run in runs)
    assert all(len(run) == repeats for run in runs[:-1])
    assert len({run[0] for run in runs}) == len(runs), "every sample comes in one run only"


def test_repeated_augmentation_keeps_the_data_set_s_length():
    indices = drawn(RepeatedAugmentationSampler(dataset()))
    assert sorted(Counter(indices).values()) == [2] + 6 * [3]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"length": 0}, "length must be from 1 to 60"),
        ({"repeats": 2, "length": 41}, "length must be from 1 to 40, 2 times .*, got 41"),
    ],
)
def test_repeats_that_cannot_be_are_an_error_in_words(params, said):
    with pytest.raises(ValueError, match=said):
        RepeatedAugmentationSampler(dataset(), **params)


def test_class_balanced_draws_classes_evenly_and_samples_within_them():
    rare = Labelled([7] * 900 + [-1] * 50 + [3] * 90 + [5] * 10)
    counts = Counter(drawn(ClassBalancedSampler(rare, num_samples=30_000)))
    of_class = Counter()
    for index, count in counts.items():
        of_class[rare.targets[index]] += count
    assert set(of_class) == {3, 5, 7}
    assert all(abs(count - 10_000) < 400 for count in of_class.values())
    assert all(abs(counts[index] - 1000) < 150 for index in range(1040, 1050))
    assert len([index for index in counts if index < 900]) == 900


def test_class_balanced_has_the_length_of_the_data_set_unless_told():
    assert len(ClassBalancedSampler(dataset())) == 20
    assert len(drawn(ClassBalancedSampler(dataset(), num_samples=7))) == 7
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        ClassBalancedSampler(dataset(), num_samples=0)
    with pytest.raises(ValueError, match="no sample has a class"):
        ClassBalancedSampler(Labelled([-1, -1]))
    with pytest.raises(DataError, match="list has no class labels"):
        ClassBalancedSampler([("a", 0.5)])


@pytest.mark.parametrize(("batch_size", "per_class"), [(8, 2), (8, 4), (4, 1), (6, 3), (5, 5)])
def test_a_batch_has_so_many_samples_of_each_of_its_classes(batch_size, per_class):
    data = dataset(43, 4)
    sampler = ClassesPerBatchSampler(data, batch_size, per_class)
    batches = drawn(sampler)
    assert len(batches) == len(sampler) == 43 // batch_size
    for batch in batches:
        assert len(batch) == len({*batch}) == batch_size
        known = [data.targets[index] for index in batch]
        groups = [known[start : start + per_class] for start in range(0, batch_size, per_class)]
        assert all(len({*group}) == 1 for group in groups)
        assert len({group[0] for group in groups}) == batch_size // per_class


def test_batches_of_classes_are_a_function_of_torch_s_seed_alone():
    sampler = ClassesPerBatchSampler(dataset(43), 8, 2)
    first, other = drawn(sampler), drawn(sampler, seed=1)
    assert drawn(sampler) == first != other
    assert drawn(ClassesPerBatchSampler(dataset(43), 8, 2)) == first


def test_no_sample_of_a_class_comes_again_before_a_new_order_begins():
    sampler = ClassesPerBatchSampler(Labelled([0] * 11), 3, 3)
    indices = [index for batch in drawn(sampler) for index in batch]
    assert len(indices) == len({*indices}) == 9
    assert indices != sorted(indices)


def test_a_small_class_gives_its_samples_equally_often():
    small = Labelled([0] * 40 + [1] * 3)
    for batch in drawn(ClassesPerBatchSampler(small, 14, 7)):
        counts = Counter(index for index in batch if index >= 40)
        assert sorted(counts.values()) == [2, 2, 3]
        assert len({index for index in batch if index < 40}) == 7


def test_all_classes_have_equal_chances_and_samples_without_one_do_not_come():
    data = Labelled([0] * 2000 + [1] * 20 + [2] * 20 + [-1] * 500)
    batches = drawn(ClassesPerBatchSampler(data, 4, 2))
    assert len(batches) == 2040 // 4
    in_batches = Counter(data.targets[batch[start]] for batch in batches for start in (0, 2))
    assert set(in_batches) == {0, 1, 2}
    assert all(abs(count - 340) < 60 for count in in_batches.values())


def test_an_epoch_has_at_least_one_batch():
    assert len(drawn(ClassesPerBatchSampler(dataset(4), 8, 2))) == 1


@pytest.mark.parametrize(
    ("batch_size", "per_class", "said"),
    [
        (8, 3, r"batch_size \(8\) must be a multiple of samples_per_class \(3\)"),
        (8, 0, "must be a multiple"),
        (8, 16, "must be a multiple"),
        (10, 2, "a batch of 10 with 2 samples a class needs 5 classes; the data set has 4"),
    ],
)
def test_batches_that_cannot_be_are_an_error_in_words(batch_size, per_class, said):
    with pytest.raises(ValueError, match=said):
        ClassesPerBatchSampler(dataset(), batch_size, per_class)
