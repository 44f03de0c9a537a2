"""Fixed views of samples: which come when, and that they look the same whenever they come."""

from collections import Counter

import pytest
import torch

from distill.data.loader import Loading, sample_batch, training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.testing import ToyData

SIZE, VIEWS = 10, 4


def jitter(value):
    return value + torch.randn(value.shape)


class Counted(ToyData):
    """Counts how often samples are read, and draws when it reads one."""

    reads = 0

    def __getitem__(self, index):
        type(self).reads += 1
        value, label = super().__getitem__(index)
        return value + torch.rand(1), label


def source():
    Counted.reads = 0
    return Source("data", Counted(SIZE), [jitter])


def plan(**more):
    return Plan(SIZE, 4, **{"views": VIEWS, **more})


def keys(of, epoch, seed=0):
    return [key for part in of.parts(seed, epoch) for key in part.keys]


def batches(of, epoch, seed=0, workers=0):
    given = training_batches(source(), of, Loading(workers), seed=seed, epoch=epoch)
    return list(given)


def images(of, epochs, **more):
    """Return (sample, view) -> every look of it."""
    found = {}
    for epoch in epochs:
        for batch in batches(of, epoch, **more):
            for index, view, image in zip(batch.index, batch.view, batch.inputs, strict=True):
                found.setdefault((int(index), int(view)), []).append(image)
    return found


def test_each_epoch_takes_the_next_view_of_every_sample():
    for epoch in range(2 * VIEWS):
        assert sorted(keys(plan(), epoch)) == [(i, epoch % VIEWS) for i in range(SIZE)]


def test_views_do_not_change_the_order():
    for epoch in range(3):
        plain = [i for i, _ in keys(Plan(SIZE, 4), epoch)]
        assert [i for i, _ in keys(plan(), epoch)] == plain


@pytest.mark.parametrize("at_once", [2, 4])
def test_views_at_once_follow_one_another_and_all_come_once(at_once):
    of = plan(views_at_once=at_once)
    seen = Counter()
    for epoch in range(VIEWS):
        given = keys(of, epoch)
        assert len(given) == SIZE
        seen.update(given)
    assert seen == Counter({(i, v): 1 for i in range(SIZE) for v in range(VIEWS)})
    row = [key for epoch in range(at_once) for key in keys(of, epoch)]
    for first in range(0, len(row), at_once):
        assert row[first : first + at_once] == [(row[first][0], v) for v in range(at_once)]


def test_views_at_once_take_other_views_in_the_next_turn():
    of = plan(views_at_once=2)
    assert {v for _, v in keys(of, 0)} == {0, 1}
    assert {v for _, v in keys(of, 2)} == {2, 3}
    assert {v for _, v in keys(of, 4)} == {0, 1}
    assert [i for i, _ in keys(of, 0)] != [i for i, _ in keys(of, 4)]


def test_an_order_with_a_period_comes_again():
    of = plan(period=VIEWS)
    assert keys(of, 1) == keys(of, 1 + VIEWS)
    assert keys(of, 1) != [(i, 1) for i, _ in keys(of, 2)]


def test_a_sample_that_comes_twice_in_an_epoch_comes_in_two_views():
    given = keys(plan(sampler=[3, 3, 5, 3]), 0)
    assert given == [(3, 0), (3, 1), (5, 0), (3, 2)]


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_view_looks_the_same_in_every_epoch_run_and_worker(at_once):
    of = plan(views_at_once=at_once)
    found = images(of, range(2 * VIEWS))
    other = images(of, range(VIEWS), seed=7, workers=2)
    assert len(found) == SIZE * VIEWS
    for key, looks in found.items():
        assert all(torch.equal(look, looks[0]) for look in [*looks, *other[key]])


def test_views_look_the_same_whether_they_come_at_once_or_not():
    one = images(plan(), range(VIEWS))
    other = images(plan(views_at_once=VIEWS), range(VIEWS))
    assert all(torch.equal(one[key][0], other[key][0]) for key in one)


def test_views_of_one_sample_differ():
    found = images(plan(), range(VIEWS))
    assert not torch.equal(found[0, 0][0], found[0, 1][0])


def test_without_views_every_epoch_looks_another_way():
    one, other = (batches(Plan(SIZE, 4), epoch) for epoch in (0, 1))
    assert one[0].view is None
    assert not torch.equal(one[0].inputs.sort(0)[0], other[0].inputs.sort(0)[0])


def test_views_at_once_are_of_one_reading():
    batches(plan(views_at_once=2), 0)
    at_once = Counted.reads
    batches(plan(), 0)
    assert (at_once, Counted.reads) == (SIZE // 2, SIZE)


def test_a_transform_that_writes_into_its_image_leaves_the_next_view_alone():
    plain = Source("data", ToyData(SIZE), [lambda value: value.add_(torch.randn(4))])
    found = {}
    for at_once in (1, 2):
        of = plan(views_at_once=at_once)
        data = Source("data", ToyData(SIZE), plain.transforms)
        for batch in training_batches(data, of, seed=0, epoch=0):
            for index, view, image in zip(batch.index, batch.view, batch.inputs, strict=True):
                found.setdefault((int(index), int(view)), []).append(image)
    pairs = [looks for looks in found.values() if len(looks) == 2]
    assert pairs
    assert all(torch.equal(*looks) for looks in pairs)


def test_the_first_samples_are_the_first_views():
    data = source()
    first = sample_batch(data, 2, 5, views=True)
    looks = images(plan(), [0])
    assert all(torch.equal(first.inputs[i], looks[i, 0][0]) for i in (0, 1))


def test_fingerprints_are_of_what_a_model_is_given():
    def taken(of, epoch, fingerprints):
        given = training_batches(source(), of, seed=0, epoch=epoch, fingerprints=fingerprints)
        return {
            (int(i), int(v)): int(f)
            for batch in given
            for i, v, f in zip(batch.index, batch.view, batch.fingerprint, strict=True)
        }

    one = taken(plan(), 0, "inputs")
    assert one == taken(plan(), VIEWS, "inputs")
    assert one != taken(plan(), 0, "all")
    other = taken(plan(), 1, "inputs")
    assert not set(one.values()) & set(other.values())
