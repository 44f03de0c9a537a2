"""Data set -> batches of this process."""

import os
import random
import signal
import time
import traceback

import numpy
import pytest
import torch

from distill import Batch, DataError, Sample
from distill.data.loader import Loading, evaluation_batches, sample_batch, training_batches
from distill.data.plan import Plan
from distill.data.reading_samples import LONGEST_GAP
from distill.data.source import Source
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

    def __init__(self, size, fail_at=()):
        self.size, self.fail_at = size, fail_at

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.fail_at:
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


class Deadly(Numbers):
    """Kills or hangs the worker that reads sample 3."""

    def __init__(self, size, hang=False):
        super().__init__(size)
        self.hang = hang

    def __getitem__(self, index):
        if index == 3 and self.hang:
            time.sleep(60)
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Given:
    """A sampler."""

    def __init__(self, *indices):
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


SKIPPING = Loading(on_bad_sample="skip")


def epoch_of(source, plan, loading=None, **options):
    loading = loading or Loading()
    return list(training_batches(source, plan, loading, **{"seed": 1, "epoch": 0, **options}))


def indices(batches):
    return [index for batch in batches for index in batch.index.tolist()]


def test_batches_are_those_of_the_plan():
    plan = Plan(19, 4, accumulate=2)
    batches = epoch_of(Source("n", Numbers(19)), plan)
    parts = list(plan.parts(1, 0))
    assert [batch.index.tolist() for batch in batches] == plan.draw(1, 0)
    assert [batch.inputs.tolist() for batch in batches] == plan.draw(1, 0)
    assert [batch.targets.tolist() for batch in batches] == plan.draw(1, 0)
    for batch, part in zip(batches, parts, strict=True):
        assert (batch.share, batch.ends_step) == (part.share, part.ends_step)
        assert (batch.lead, batch.skipped) == (0, ())


def test_a_rank_reads_its_part_with_what_stands_in_front(every_rank):
    plan = Plan(11, 6)
    source = Source("n", Numbers(11))
    read = every_rank(3, lambda: (epoch_of(source, plan, lead=2), list(plan.parts(1, 0, 2))))
    for batches, parts in read:
        for batch, part in zip(batches, parts, strict=True):
            assert batch.index.tolist() == [index for index, _ in part.keys]
            assert (batch.share, batch.lead) == (part.share, 2)


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


def test_augmentation_differs_between_the_times_a_sample_comes_in_an_epoch():
    plan = Plan(2, 3, sampler=Given(1, 1, 0, 1, 0))
    drawn = epoch_of(Source("zeros", [(torch.zeros(()), 0)] * 2, [add_noise]), plan)
    assert len({value.item() for batch in drawn for value in batch.inputs}) == 5


@pytest.mark.parametrize("prefetch", [1, 3])
def test_number_of_workers_does_not_change_a_bit(prefetch):
    source, plan = Source("toy", ToyData(10), [add_noise]), Plan(10, 4)
    two = Loading(workers=2, prefetch=prefetch)
    for left, right in zip(epoch_of(source, plan), epoch_of(source, plan, two), strict=True):
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.index, right.index)
    alone = list(evaluation_batches(source, 4, seed=1))
    for left, right in zip(alone, evaluation_batches(source, 4, two, seed=1), strict=True):
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
def test_ranks_part_every_global_batch_and_no_sample_comes_twice(every_rank, world, size):
    plan = Plan(size, 8)
    parts = every_rank(world, lambda: epoch_of(Source("n", Numbers(size)), plan))
    assert {len(batches) for batches in parts} == {plan.steps}
    for step, whole in enumerate(plan.draw(1, 0)):
        counted = [batches[step] for batches in parts if batches[step].share > 0]
        assert indices(counted) == whole


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("size", [16, 17, 19, 2])
def test_shares_weigh_the_ranks_means_to_the_mean_of_the_step(every_rank, world, size, accumulate):
    plan = Plan(size, 8, accumulate=accumulate)
    parts = every_rank(world, lambda: epoch_of(Source("n", Numbers(size)), plan))
    whole = plan.draw(1, 0)
    for first in range(0, len(whole), accumulate):
        mean = torch.zeros(())
        for number in range(first, min(first + accumulate, len(whole))):
            weighted = [batches[number].share * batches[number].inputs.mean() for batches in parts]
            mean += torch.stack(weighted).mean()
        samples = [index for batch in whole[first : first + accumulate] for index in batch]
        assert torch.allclose(mean, torch.tensor(samples).float().mean())


@pytest.mark.parametrize(("size", "world"), [(12, 2), (13, 3), (2, 4)])
def test_evaluation_reads_every_sample_once_on_however_many_ranks(every_rank, size, world):
    source = Source("n", Numbers(size))
    parts = every_rank(world, lambda: list(evaluation_batches(source, 4, seed=1)))
    assert sorted(i for batches in parts for i in indices(batches)) == list(range(size))


@pytest.mark.parametrize(("size", "world"), [(12, 2), (13, 3), (2, 4), (9, 4)])
def test_in_step_all_ranks_evaluate_as_many_batches_and_count_every_sample_once(
    every_rank, size, world
):
    source = Source("n", Numbers(size))
    parts = every_rank(world, lambda: list(evaluation_batches(source, 4, seed=1, in_step=True)))
    assert len({len(batches) for batches in parts}) == 1
    counted = [batch for batches in parts for batch in batches if batch.share]
    assert sorted(indices(counted)) == list(range(size))


def test_first_samples_are_those_of_the_data_set_or_as_many_as_there_are():
    assert sample_batch(Source("n", Numbers(9)), 2, seed=1).index.tolist() == [0, 1]
    assert sample_batch(Source("n", Numbers(1)), 2, seed=1).index.tolist() == [0]


def test_a_batch_keeps_the_extras_of_its_samples():
    dataset = [Sample(torch.ones(()), 4, extras={"views": torch.zeros(2)})]
    batch = sample_batch(Source("s", dataset, [lambda value: value * 3]), 1, seed=1)
    assert batch.inputs.tolist() == [3.0]
    assert batch.targets.tolist() == [4]
    assert batch.extras["views"].shape == (1, 2)
    assert batch.index.tolist() == [0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_names_data_set_and_sample(workers):
    source = Source("photos", Numbers(6, fail_at=[3]))
    with pytest.raises(DataError) as caught:
        epoch_of(source, Plan(6, 2), Loading(workers))
    assert str(caught.value) == (
        "data set 'photos': sample 3 cannot be read: OSError: the file is damaged; "
        "data: {on_bad_sample: skip} passes over such samples"
    )
    assert "Traceback" not in "".join(traceback.format_exception_only(caught.value))


def test_an_error_of_a_transform_names_data_set_and_sample():
    source = Source("photos", Numbers(6), [refuse_label_two])
    with pytest.raises(DataError, match=r"'photos': sample 2 .*ValueError: cannot be decoded"):
        list(evaluation_batches(source, 4, seed=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_may_be_skipped_for_the_next_one(workers):
    source, plan = Source("photos", Numbers(6, fail_at=[2, 3])), Plan(6, 2)
    batches = epoch_of(source, plan, Loading(workers, on_bad_sample="skip"))
    instead = {2: 4, 3: 4}
    expected = [[instead.get(i, i) for i in batch] for batch in plan.draw(1, 0)]
    assert [batch.index.tolist() for batch in batches] == expected
    assert [batch.targets.tolist() for batch in batches] == expected
    skipped = [pair for batch in batches for pair in batch.skipped]
    assert sorted(index for index, _ in skipped) == [2, 3, 3]
    assert all(f"sample {index} cannot be read: OSError" in why for index, why in skipped)


def test_the_last_sample_is_skipped_for_the_first():
    (batch,) = epoch_of(Source("n", Numbers(3, fail_at=[2])), Plan(3, 3), SKIPPING)
    assert sorted(batch.index.tolist()) == [0, 0, 1]


@pytest.mark.parametrize("size", [4, 150])
def test_a_data_set_of_which_nothing_can_be_read_is_an_error_though_samples_are_skipped(size):
    source = Source("photos", Numbers(size, fail_at=range(size)))
    said = f"{min(size, LONGEST_GAP)} samples in a row cannot be read: .*'photos': sample"
    with pytest.raises(DataError, match=said):
        epoch_of(source, Plan(size, 2), SKIPPING)


@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_skipped_sample_does_not_count_in_an_evaluation(batch_size):
    """With 3 samples a batch, the last batch is a single one that cannot be read."""
    source = Source("photos", Numbers(7, fail_at=[1, 6]))
    batches = list(evaluation_batches(source, batch_size, SKIPPING, seed=1))
    assert indices(batches) == [0, 2, 3, 4, 5]
    skipped = [index for batch in batches for index, _ in batch.skipped]
    assert skipped == [1, 6]


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_unequal_shape_are_a_data_error(workers):
    with pytest.raises(
        DataError, match="data set 'rows': samples cannot be put into a batch"
    ) as said:
        epoch_of(Source("rows", Rows(4)), Plan(4, 4), Loading(workers))
    assert "on_bad_sample" not in str(said.value)  # which would not help


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


def test_a_worker_that_dies_names_the_sample_it_read():
    with pytest.raises(DataError) as caught:
        epoch_of(Source("photos", Deadly(6)), Plan(6, 2), Loading(workers=1))
    said = str(caught.value)
    assert said.startswith("data set 'photos': a loader worker died reading sample 3 (")
    assert "fewer data.workers need less" in said


def test_a_worker_that_hangs_names_the_sample_it_reads():
    with pytest.raises(DataError) as caught:
        epoch_of(Source("photos", Deadly(6, hang=True)), Plan(6, 2), Loading(1, timeout=2))
    said = "no loader worker has answered for 2 s (data.worker_timeout) reading sample 3"
    assert str(caught.value) == f"data set 'photos': {said}"


def test_a_sources_own_collate_puts_its_samples_together():
    def listed(samples):
        index = torch.tensor([sample.index for sample in samples])
        return Batch([sample.input for sample in samples], None, index)

    source = Source("rows", Rows(4), collate=listed)
    (batch,) = epoch_of(source, Plan(4, 4))
    assert [len(row) for row in batch.inputs] == [index + 1 for index in batch.index.tolist()]
