import random
import traceback

import numpy
import pytest
import torch

from distill import DataError, Sample, distributed
from distill.data.loader import (
    Plan,
    Source,
    evaluation_batches,
    sample_batch,
    training_batches,
)
from distill.testing import ToyData


def add_noise(value):
    """A random transform that draws from every generator that transforms draw from."""
    return value + torch.rand(()) + random.random() + float(numpy.random.rand())


def refuse_label_two(value):
    if value == 2:
        raise ValueError("cannot be decoded")
    return value


class Numbers:
    """Sample ``n`` is the number n, its target too."""

    def __init__(self, size, fail_at=None):
        self.size, self.fail_at = size, fail_at

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.fail_at:
            raise OSError("the file is damaged")
        return torch.tensor(float(index)), index


class Rows(Numbers):
    """Samples of growing length, or with extras that not all have."""

    def __init__(self, size, key=None):
        super().__init__(size)
        self.key = key

    def __getitem__(self, index):
        if self.key is None:
            return torch.zeros(index + 1), index
        return Sample(torch.zeros(1), index, extras={self.key(index): 1})


def epoch_of(source, plan, **options):
    return list(training_batches(source, plan, **{"seed": 1, "epoch": 0, **options}))


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def every_rank(monkeypatch, world, read):
    parts = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        parts.append(read())
    return parts


def test_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    plan = Plan(size=50, batch_size=8)
    assert sorted(plan.order(1, 0)) == list(range(50))
    torch.rand(3)
    assert plan.order(1, 0) == plan.order(1, 0)
    assert plan.order(1, 0) != plan.order(1, 1)
    assert plan.order(1, 0) != plan.order(2, 0)


@pytest.mark.parametrize(
    ("size", "drop_last", "lengths"),
    [(16, False, [8, 8]), (17, False, [8, 8, 1]), (17, True, [8, 8]), (5, False, [5])],
)
def test_plan_counts_its_steps(size, drop_last, lengths):
    plan = Plan(size, 8, drop_last)
    assert [len(batch) for batch in plan.batches(1, 0)] == lengths
    assert plan.steps == len(lengths)


def test_an_epoch_goes_on_from_any_step_as_it_would_have():
    plan = Plan(size=21, batch_size=4)
    assert plan.batches(1, 0, first_step=2) == plan.batches(1, 0)[2:]
    late = epoch_of(Source("n", Numbers(21)), plan, first_step=2)
    assert [batch.index.tolist() for batch in late] == plan.batches(1, 0)[2:]


def test_the_same_seed_and_epoch_give_the_same_bits_twice():
    source, plan = Source("toy", ToyData(10), [add_noise]), Plan(10, 4)
    first = epoch_of(source, plan)
    torch.rand(1), random.random(), numpy.random.rand()
    for left, right in zip(first, epoch_of(source, plan), strict=True):
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.targets, right.targets)


def test_augmentation_differs_between_epochs_and_samples():
    source, plan = Source("zeros", [(torch.zeros(()), 0)] * 8, [add_noise]), Plan(8, 4)
    drawn = [v for e in range(2) for b in epoch_of(source, plan, epoch=e) for v in b.inputs]
    assert len({value.item() for value in drawn}) == 16


def test_number_of_workers_does_not_change_a_bit():
    source, plan = Source("toy", ToyData(10), [add_noise]), Plan(10, 4)
    for left, right in zip(epoch_of(source, plan), epoch_of(source, plan, workers=2), strict=True):
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.index, right.index)
    alone = list(evaluation_batches(source, 4, seed=1))
    for left, right in zip(alone, evaluation_batches(source, 4, seed=1, workers=2), strict=True):
        assert torch.equal(left.inputs, right.inputs)


def test_reading_batches_leaves_torchs_global_generator_alone_between_samples():
    torch.manual_seed(0)
    undisturbed = torch.rand(1)
    torch.manual_seed(0)
    iterator = training_batches(Source("n", []), Plan(0, 4), seed=1, epoch=0)
    assert list(iterator) == []
    assert torch.equal(torch.rand(1), undisturbed)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("size", [16, 17, 21])
def test_ranks_part_every_global_batch_and_no_sample_comes_twice(monkeypatch, world, size):
    plan = Plan(size, 8)
    parts = every_rank(monkeypatch, world, lambda: epoch_of(Source("n", Numbers(size)), plan))
    assert {len(batches) for batches in parts} == {plan.steps}
    for step, whole in enumerate(plan.batches(1, 0)):
        counted = [batches[step] for batches in parts if batches[step].share > 0]
        assert sorted(i for batch in counted for i in batch.index.tolist()) == sorted(whole)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("size", [16, 17, 19, 2])
def test_shares_weigh_the_ranks_means_to_the_mean_of_the_global_batch(monkeypatch, world, size):
    plan = Plan(size, 8)
    parts = every_rank(monkeypatch, world, lambda: epoch_of(Source("n", Numbers(size)), plan))
    for step, whole in enumerate(plan.batches(1, 0)):
        weighted = [batches[step].share * batches[step].inputs.mean() for batches in parts]
        mean = torch.stack(weighted).mean()
        assert torch.allclose(mean, torch.tensor(whole).float().mean())


@pytest.mark.parametrize(("size", "world"), [(12, 2), (13, 3), (2, 4)])
def test_evaluation_reads_every_sample_once_on_however_many_ranks(monkeypatch, size, world):
    source = Source("n", Numbers(size))
    parts = every_rank(monkeypatch, world, lambda: list(evaluation_batches(source, 4, seed=1)))
    read = [i for batches in parts for batch in batches for i in batch.index.tolist()]
    assert sorted(read) == list(range(size))


def test_first_samples_are_those_of_the_data_set_or_as_many_as_there_are():
    assert sample_batch(Source("n", Numbers(9)), 2, seed=1).index.tolist() == [0, 1]
    assert sample_batch(Source("n", Numbers(1)), 2, seed=1).index.tolist() == [0]


def test_a_sample_keeps_its_extras_and_is_given_its_index():
    dataset = [Sample(torch.ones(()), 4, extras={"views": torch.zeros(2)})]
    batch = sample_batch(Source("s", dataset, [lambda value: value * 3]), 1, seed=1)
    assert batch.inputs.tolist() == [3.0]
    assert batch.targets.tolist() == [4]
    assert batch.extras["views"].shape == (1, 2)
    assert batch.index.tolist() == [0]


def test_source_tells_its_classes_if_the_data_set_does():
    assert Source("toy", ToyData(4, classes=2)).classes == ["class 0", "class 1"]
    assert Source("n", Numbers(4)).classes is None
    odd = Numbers(4)
    odd.classes = 10
    assert Source("n", odd).classes is None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_names_data_set_and_sample(workers):
    source = Source("photos", Numbers(6, fail_at=3))
    with pytest.raises(DataError) as caught:
        epoch_of(source, Plan(6, 2), workers=workers)
    assert str(caught.value) == (
        "data set 'photos': sample 3 cannot be read: OSError: the file is damaged"
    )
    assert "Traceback" not in "".join(traceback.format_exception_only(caught.value))


def test_an_error_of_a_transform_names_data_set_and_sample():
    source = Source("photos", Numbers(6), [refuse_label_two])
    with pytest.raises(DataError, match=r"'photos': sample 2 .*ValueError: cannot be decoded"):
        list(evaluation_batches(source, 4, seed=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_unequal_shape_are_a_data_error(workers):
    with pytest.raises(DataError, match="data set 'rows': samples cannot be put into a batch"):
        epoch_of(Source("rows", Rows(4)), Plan(4, 4), workers=workers)


def test_samples_with_unequal_extras_are_a_data_error_that_names_the_key():
    dataset = Rows(4, key=lambda index: "even" if index % 2 == 0 else "odd")
    with pytest.raises(DataError, match=r"'rows': .* not every sample has the key '(even|odd)'"):
        epoch_of(Source("rows", dataset), Plan(4, 4))


def test_images_that_no_transform_turned_into_tensors_give_the_hint(monkeypatch):
    class Image:
        """Stands in for PIL's."""

    monkeypatch.setattr(Image, "__module__", "PIL.Image")
    source = Source("photos", [(Image(), 0), (Image(), 1)])
    with pytest.raises(DataError, match="PIL images; end its transforms with ToImage"):
        sample_batch(source, 2, seed=1)
