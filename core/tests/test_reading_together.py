"""Data sets that read several samples at once: fewer calls, and not a bit of difference."""

import os
import random
import signal

import numpy
import pytest
import torch
from torch.utils.data import StackDataset
from torch.utils.data import Subset as TorchSubset

from distill import DataError, Observer, Sample, run
from distill.builtin.subsets import Subset
from distill.data.keepable import split
from distill.data.keeping import keep
from distill.data.loader import Loading, evaluation_batches, sample_batch, training_batches
from distill.data.plan import Plan
from distill.data.reading_notes import reading_notes
from distill.data.reading_samples import CHANGES, DIFFERS, DRAWS, INCOMPARABLE, TRIED
from distill.data.source import Source
from distill.testing import ToyData, toy_experiment, toy_registry

SIZE = 24
TRIALS = 2 * TRIED
"""Readings one by one of the first samples read together, to compare them with."""


class Numbers:
    """Sample ``n`` is (n, n, n) with the target n; some cannot be read, or take the process."""

    def __init__(self, size=SIZE, bad=(), deadly=()):
        self.size, self.bad, self.deadly = size, set(bad), set(deadly)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"file {index} is damaged")
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3,), float(index)), index


class Together(Numbers):
    """The same, and notes in shared memory how often each way is asked."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.calls = torch.zeros(2, dtype=torch.long).share_memory_()
        self.read = []

    def __getitem__(self, index):
        self.calls[0] += 1
        return super().__getitem__(index)

    def __getitems__(self, indices):
        assert all(type(index) is int for index in indices)
        assert len(set(indices)) == len(indices) > 0
        self.calls[1] += 1
        self.read += indices
        for index in indices:
            super().__getitem__(index)
        rows = torch.tensor(indices).float()[:, None].repeat(1, 3)
        return [Sample(row, index) for row, index in zip(rows, indices, strict=True)]


class Drawing(Together):
    """Draws from a generator for some samples."""

    def __init__(self, draw, draw_at=range(SIZE)):
        super().__init__()
        self.draw, self.draw_at = draw, draw_at

    def __getitem__(self, index):
        value, label = super().__getitem__(index)
        return (value + float(self.draw()) if index in self.draw_at else value), label

    def __getitems__(self, indices):
        super().__getitems__(indices)
        return [Drawing.__getitem__(self, index) for index in indices]


class Wrong(Together):
    """Gives something else than a list of as many items as it is asked for."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def __getitem__(self, index):
        return super().__getitem__(index)

    def __getitems__(self, indices):
        return self.spoil(super().__getitems__(indices))


class Negative(Together):
    """Changes what it inherits, but only one by one."""

    def __getitem__(self, index):
        value, label = super().__getitem__(index)
        return -value, label


class Delegating:
    """Changes what it wraps, and has all other attributes of it."""

    def __init__(self, dataset):
        self.wrapped = dataset

    def __len__(self):
        return len(self.wrapped)

    def __getitem__(self, index):
        value, label = self.wrapped[index]
        return -value, label

    def __getattr__(self, name):
        if name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)


class OneByOne:
    """A data set without its way to read several samples."""

    def __init__(self, dataset):
        self.wrapped = dataset

    def __len__(self):
        return len(self.wrapped)

    def __getitem__(self, index):
        return self.wrapped[index]


def noise(value):
    return value + torch.rand(3) + random.random() + float(numpy.random.rand())


def noise_in_place(value):
    return value.mul_(2).add_(torch.rand(3))


def refuse_five(value):
    if value[0] == 5:
        raise ValueError("five")
    return value


SKIPPING = Loading(on_bad_sample="skip")
REPEATS = [3, 3, 5, 3, 5, 0, 1, 0, 3, 3]
PLANS = {
    "once": {},
    "repeated": {"sampler": REPEATS},
    "views": {"views": 4},
    "views of repeated": {"views": 4, "sampler": REPEATS},
    "views at once": {"views": 4, "views_at_once": 2, "batch_size": 5},
    "all views at once": {"views": 4, "views_at_once": 4, "batch_size": 6},
    "views at once of repeated": {"views": 4, "views_at_once": 2, "sampler": REPEATS},
}


def epoch_of(dataset, transforms=(noise,), loading=None, epoch=0, **plan):
    plan = Plan(len(dataset), **{"batch_size": 4, **plan})
    source = Source("photos", dataset, list(transforms))
    given = training_batches(source, plan, loading or Loading(), seed=1, epoch=epoch)
    return list(given)


def evaluated(dataset, loading=None):
    source = Source("photos", dataset, [noise])
    return list(evaluation_batches(source, 5, loading or Loading(), seed=1))


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.index, b.index)
        and (a.view is b.view is None or torch.equal(a.view, b.view))
        and a.skipped == b.skipped
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_can_is_asked_once_a_batch(workers):
    data = Together()
    batches = epoch_of(data, loading=Loading(workers))
    assert data.calls.tolist() == [TRIALS * max(1, workers), len(batches)]
    assert equal(batches, epoch_of(Numbers()))
    data = Together()
    batches = evaluated(data, Loading(workers))
    assert data.calls.tolist() == [TRIALS * max(1, workers), len(batches)]
    assert equal(batches, evaluated(Numbers()))


def test_samples_read_together_know_their_places():
    read = Source("photos", Together()).untransformed_together([7, 2])
    assert {index: (sample.index, sample.target) for index, sample in read.items()} == {
        7: (7, 7),
        2: (2, 2),
    }


def test_first_samples_are_read_together():
    data = Together()
    assert sample_batch(Source("photos", data), 3, seed=1).targets.tolist() == [0, 1, 2]
    assert data.calls.tolist() == [TRIALS, 1]


@pytest.mark.parametrize("transform", [noise, noise_in_place])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_no_bit_depends_on_whether_samples_are_read_together(plan, transform):
    """Also not where a sample comes twice in a batch and a transform writes into it."""
    for epoch in range(2):
        data = Together()
        together = epoch_of(data, [transform], epoch=epoch, **plan)
        assert data.calls[1] > 0
        assert equal(together, epoch_of(Numbers(), [transform], epoch=epoch, **plan))


def test_views_at_once_are_of_one_reading_across_batches():
    """Batches of 5 end between the two views of a sample, whose reading serves the next one."""
    data = Together()
    batches = epoch_of(data, views=4, views_at_once=2, batch_size=5)
    assert data.calls.tolist() == [TRIALS, len(batches)]
    seen = [index for batch in batches for index in batch.index.tolist()]
    assert data.read == seen[::2] == seen[1::2]


def test_copying_a_sample_for_its_next_view_leaves_the_others_of_its_batch_alone():
    """Samples that are rows of one tensor: each copy is to take the room of a row."""
    taken = []

    def note_room(value):
        taken.append(value.untyped_storage().nbytes())
        return value

    epoch_of(Together(), [note_room], views=2, views_at_once=2, batch_size=8)
    assert set(taken) == {3 * 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_of_a_batch_is_named(workers):
    with pytest.raises(DataError) as caught:
        epoch_of(Together(bad=[9]), loading=Loading(workers))
    assert str(caught.value) == (
        "data set 'photos': sample 9 cannot be read: OSError: file 9 is damaged; "
        "data: {on_bad_sample: skip} passes over such samples"
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_stand_ins_are_those_of_reading_one_by_one(plan, workers):
    """Of what cannot be read and of what a transform refuses: the next one may be read already."""
    loading = Loading(workers, on_bad_sample="skip")
    transforms = [refuse_five, noise_in_place]
    data = Together(bad=[2, 3, 7])
    together = epoch_of(data, transforms, loading, **plan)
    assert data.calls.min() > 0
    assert equal(together, epoch_of(Numbers(bad=[2, 3, 7]), transforms, SKIPPING, **plan))
    assert any(batch.skipped for batch in together)


def test_a_bad_sample_is_left_out_of_an_evaluation_as_if_read_one_by_one():
    together = evaluated(Together(bad=[2, 3, 7]), SKIPPING)
    assert equal(together, evaluated(Numbers(bad=[2, 3, 7]), SKIPPING))
    assert [index for batch in together for index, _ in batch.skipped] == [2, 3, 7]


def test_only_the_batch_that_fails_is_read_one_by_one():
    data = Together(bad=[9])
    batches = epoch_of(data, loading=SKIPPING)
    assert data.calls.tolist() == [TRIALS + 5, len(batches)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(()), random.random, numpy.random.rand],
    ids=["torch", "random", "numpy"],
)
def test_a_data_set_that_draws_is_asked_together_once_and_then_left_alone(draw, plan):
    data = Drawing(draw)
    together = epoch_of(data, **plan)
    assert data.calls[1] == 1
    assert equal(together, epoch_of(OneByOne(data), **plan))


def forked():
    with torch.random.fork_rng(devices=[]):
        return torch.rand(())


def restored():
    state = random.getstate()
    number = random.random()
    random.setstate(state)
    return number


def seeding(seed):
    """Return what draws nothing, and lets all that is drawn behind it begin at one place."""

    def draw():
        torch.manual_seed(seed)
        return 0

    return draw


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "draw",
    [
        lambda: numpy.random.default_rng(torch.initial_seed()).random(),
        forked,
        restored,
        seeding(0),
        seeding(7),
    ],
    ids=["initial_seed", "forked", "restored", "seed 0", "seed 7"],
)
def test_a_data_set_that_moves_no_generator_and_looks_at_one_is_read_one_by_one(draw, plan):
    data = Drawing(draw)
    together = epoch_of(data, [noise], **plan)
    assert data.calls[1] == 1
    assert equal(together, epoch_of(OneByOne(data), [noise], **plan))


def test_a_data_set_that_gives_others_together_is_read_one_by_one():
    class Values(Together):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

        def __getitems__(self, indices):
            return [item.input for item in super().__getitems__(indices)]

    class Negatives(Values):
        def __getitem__(self, index):
            return -super().__getitem__(index)

    stacked = StackDataset(Negatives(), range(SIZE))  # which asks for what its parts inherit
    assert equal(epoch_of(stacked), epoch_of(OneByOne(stacked)))


def test_a_data_set_whose_attributes_raise_is_read_one_by_one():
    class Closed(Together):
        @property
        def dataset(self):
            raise OSError("the file is closed")

    assert equal(epoch_of(Closed()), epoch_of(Numbers()))


def test_a_data_set_that_begins_to_draw_later_is_noticed():
    data = Drawing(random.random, draw_at=[9])
    together = epoch_of(data, sampler=range(SIZE))
    assert data.calls[1] == 3
    assert equal(together, epoch_of(OneByOne(data), sampler=range(SIZE)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda items: items[:-1],
        lambda items: [*items, items[0]],
        lambda items: [None, *items[1:]],
        lambda items: dict.fromkeys(f"column {n}" for n in range(len(items))),
        lambda items: (item for item in items),
        lambda items: None,
    ],
    ids=["fewer", "more", "no item", "columns", "generator", "nothing"],
)
def test_what_is_no_item_for_each_index_is_read_one_by_one(spoil):
    data = Wrong(spoil)
    assert equal(epoch_of(data), epoch_of(Numbers()))
    assert data.calls.tolist() == [SIZE, SIZE // 4]


def test_an_interruption_is_none_of_the_data_sets_failures():
    def interrupt(items):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        epoch_of(Wrong(interrupt))


@pytest.mark.parametrize("build", [Negative, lambda: Delegating(Together())])
def test_a_way_to_read_that_passes_over_what_getitem_does_is_not_taken(build):
    data = build()
    assert equal(epoch_of(data), epoch_of(OneByOne(data)))
    assert data.calls[1] == 0
    part = TorchSubset(data, range(4, 12))
    assert equal(epoch_of(part), epoch_of(OneByOne(part)))
    assert data.calls[1] == 0


@pytest.mark.parametrize("kind", [TorchSubset, lambda data, which: Subset(data, indices=which)])
def test_a_subset_reads_as_its_whole_does(kind):
    which = [5, 1, 9, 8, 2, 20, 21]
    data = Together()
    batches = epoch_of(kind(data, which))
    assert data.calls.tolist() == [TRIALS, len(batches)]
    assert equal(batches, epoch_of(kind(Numbers(), which)))


def test_a_subset_has_a_way_to_read_several_samples_if_its_whole_has():
    part = Subset(Together(), indices=[4, 2, 7])
    assert [item.target for item in part.__getitems__([2, 0])] == [7, 4]
    assert not hasattr(Subset(Numbers(), indices=[4, 2]), "__getitems__")


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_are_kept_in_memory_are_read_together(workers):
    data = Together(150)
    source = Source("photos", data, [noise])
    chosen = split(source)
    data.calls.zero_()
    kept = keep(source, chosen, Loading(workers), torch.device("cpu"))
    assert data.calls.tolist() == [TRIALS * max(1, workers), 3]
    assert kept.inputs[:, 0].tolist() == kept.targets.tolist() == list(range(150))


def test_samples_that_are_to_be_kept_and_draw_are_refused_though_read_together():
    source = Source("photos", Drawing(random.random, draw_at=[9]))
    chosen = split(source)
    with pytest.raises(DataError, match="ValueError: draws random numbers, which it did not for"):
        keep(source, chosen, Loading(), torch.device("cpu"))


def test_a_worker_that_dies_while_it_reads_together_names_the_batch():
    with pytest.raises(DataError) as caught:
        epoch_of(Together(deadly=[5]), loading=Loading(1), sampler=[4, 5, 6, 6])
    said = "data set 'photos': a loader worker died reading sample 4 or one of 2 read with it ("
    assert str(caught.value).startswith(said)


class Untold:
    """Of which it cannot be seen whether two are the same."""


def fail(items):
    raise ValueError("no column 7\nof these: ...")


def without_column(items):
    return [Sample(item.input, item.target, extras={"more": Untold()}) for item in items]


ALONE = "it is not read a batch at once: "
FAILS = "its __getitems__ fails on the first samples ({}); mend it or take it out"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (Wrong(fail), FAILS.format("ValueError: no column 7")),
        (Wrong(lambda items: items[:-1]), FAILS.format("it gives no list of as many items")),
        (Wrong(lambda items: items[::-1]), ALONE + DIFFERS),
        (Wrong(without_column), ALONE + INCOMPARABLE),
        (Drawing(random.random), ALONE + DRAWS),
        (Drawing(forked), ALONE + CHANGES),
    ],
    ids=["fails", "no list", "others", "no comparison", "draws", "changes"],
)
def test_a_data_set_that_is_not_read_together_is_told_with_the_reason(data, why):
    told = list(reading_notes([Source("photos", data)]))
    assert told == [f"data set 'photos': {why}"]


@pytest.mark.parametrize(
    "data",
    [Together(), Numbers(), Negative(), Together(0), Together(1), Together(bad=[0]), Wrong(list)],
    ids=["together", "without a way", "inherited", "empty", "one", "bad", "spoilt in nothing"],
)
def test_nothing_is_told_where_samples_are_read_together_or_cannot_be(data):
    assert list(reading_notes([Source("photos", data)])) == []


def test_looking_for_what_is_to_be_told_leaves_the_generators_as_they_are():
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    list(reading_notes([Source("photos", Drawing(random.random))]))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all()


class Heard(Observer):
    def __init__(self):
        self.notes = []

    def run_start(self, event):
        self.notes.append(list(event.notes))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_tells_once_what_is_read_one_by_one(tmp_path, workers):
    class Failing(ToyData):
        def __getitems__(self, indices):
            raise KeyError("column 7")

    heard = Heard()
    registry = toy_registry(datasets={"Failing": Failing}, observers={"Heard": lambda: heard})
    datasets = {
        "train": {"type": "Failing", "params": {"size": 20}},
        "val": {"type": "ToyData", "params": {"size": 12, "seed": 1}},
    }
    stage = {"epochs": 1, "data": {"train": "train", "batch_size": 8, "workers": workers}}
    keys = {"datasets": datasets, "observers": ["Heard"], "seeds": [1, 2]}
    experiment = toy_experiment(tmp_path, stage, {}, **keys)
    run(experiment, registry=registry, runs=tmp_path / "runs")
    why = FAILS.format("KeyError: 'column 7'")
    note = f"data set 'train': {why}"
    assert heard.notes == [[note]]
    run(experiment, registry=registry, runs=tmp_path / "runs")
    assert heard.notes == [[note], []], "a finished run reads nothing"
