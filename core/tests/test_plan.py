"""Which samples come in which batch and step, the same on every process."""

import random

import numpy
import pytest
import torch

from distill import DataError
from distill.data.plan import Plan


class Drawing:
    """A sampler that draws with repetition, from every generator that there is."""

    def __init__(self, size, length):
        self.size, self.length = size, length

    def __len__(self):
        return self.length

    def __iter__(self):
        for number in range(self.length):
            if number % 3 == 0:
                yield int(torch.randint(self.size, ()))
            elif number % 3 == 1:
                yield random.randrange(self.size)
            else:
                yield int(numpy.random.randint(self.size))


class Fixed:
    """Gives what it is told to and claims a length."""

    def __init__(self, items, length=None):
        self.items = items
        self.length = len(items) if length is None else length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.items)


def indices(part):
    return [index for index, _ in part.keys]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    plan = Plan(size=50, batch_size=8)
    assert sorted(flat(plan.draw(1, 0))) == list(range(50))
    torch.rand(3)
    assert plan.draw(1, 0) == plan.draw(1, 0)
    assert plan.draw(1, 0) != plan.draw(1, 1)
    assert plan.draw(1, 0) != plan.draw(2, 0)


@pytest.mark.parametrize(
    ("size", "drop_last", "lengths"),
    [
        (16, False, [8, 8]),
        (17, False, [8, 8, 1]),
        (17, True, [8, 8]),
        (5, False, [5]),
        (5, True, []),
    ],
)
def test_a_plan_counts_its_batches_and_steps(size, drop_last, lengths):
    plan = Plan(size, 8, drop_last)
    assert [len(batch) for batch in plan.draw(1, 0)] == lengths
    assert plan.batches == plan.steps == len(lengths)


@pytest.mark.parametrize(
    ("accumulate", "ends"),
    [
        (1, [True] * 5),
        (2, [False, True, False, True, True]),
        (3, [False, False, True, False, True]),
        (9, [False, False, False, False, True]),
    ],
)
def test_a_step_is_several_batches_and_the_last_one_of_an_epoch_may_be_fewer(accumulate, ends):
    plan = Plan(size=19, batch_size=4, accumulate=accumulate)
    parts = list(plan.parts(1, 0))
    assert [part.ends_step for part in parts] == ends
    assert plan.batches == len(parts) == 5
    assert plan.steps == sum(ends)
    assert [indices(part) for part in parts] == plan.draw(1, 0)


def test_alone_a_process_has_all_of_every_batch():
    parts = list(Plan(size=10, batch_size=4).parts(1, 0))
    assert [part.share for part in parts] == [1.0, 1.0, 1.0]
    assert [part.lead for part in parts] == [0, 0, 0]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("size", [16, 17, 21])
def test_ranks_part_every_global_batch_in_its_order_and_no_sample_comes_twice(
    every_rank, world, size
):
    plan = Plan(size, 8)
    parts = every_rank(world, lambda: list(plan.parts(1, 0)))
    assert {len(of_rank) for of_rank in parts} == {plan.steps}
    for step, whole in enumerate(plan.draw(1, 0)):
        counted = [of_rank[step] for of_rank in parts if of_rank[step].share > 0]
        assert flat(map(indices, counted)) == whole
        assert max(len(part.keys) for part in counted) <= -(-len(whole) // world)


def test_a_process_with_nothing_left_gets_a_sample_that_does_not_count(every_rank):
    parts = every_rank(4, lambda: list(Plan(2, 8).parts(1, 0)))
    assert [len(part.keys) for (part,) in parts] == [1, 1, 1, 1]
    assert sorted(part.share for (part,) in parts) == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [16, 17, 19, 2])
def test_shares_weigh_the_ranks_means_to_the_mean_of_all_samples_of_a_step(
    every_rank, world, size, accumulate
):
    plan = Plan(size, 8, accumulate=accumulate)
    parts = every_rank(world, lambda: list(plan.parts(1, 0)))
    batches, total, seen = plan.draw(1, 0), 0.0, []
    for number, whole in enumerate(batches):
        of_ranks = [of_rank[number] for of_rank in parts]
        total += sum(p.share * sum(indices(p)) / len(p.keys) for p in of_ranks) / world
        seen += whole
        assert len({part.ends_step for part in of_ranks}) == 1
        if of_ranks[0].ends_step:
            assert total == pytest.approx(sum(seen) / len(seen))
            total, seen = 0.0, []
    assert seen == []


@pytest.mark.parametrize("lead", [1, 2, 5])
def test_in_front_of_a_part_stand_the_samples_before_it_in_a_circle(every_rank, lead):
    plan = Plan(size=11, batch_size=6)
    parts = every_rank(3, lambda: list(plan.parts(1, 0, lead)))
    plain = every_rank(3, lambda: list(plan.parts(1, 0)))
    for number, whole in enumerate(plan.draw(1, 0)):
        for rank in range(3):
            part, own = parts[rank][number], plain[rank][number]
            assert part.lead == lead
            assert part.keys[lead:] == own.keys
            assert part.share == own.share
            start = len(whole) * rank // 3
            before = [whole[i % len(whole)] for i in range(start - lead, start)]
            assert indices(part)[:lead] == before


def test_alone_a_process_needs_no_samples_in_front():
    plan = Plan(size=11, batch_size=6)
    assert list(plan.parts(1, 0, lead=2)) == list(plan.parts(1, 0))


def test_what_a_sampler_draws_depends_on_seed_and_epoch_alone():
    plan = Plan(size=9, batch_size=4, sampler=Drawing(9, 14))
    random.seed(0)
    torch.manual_seed(0)
    numpy.random.seed(0)
    first = plan.draw(1, 0)
    after = torch.rand(1), random.random(), numpy.random.rand()
    assert [len(batch) for batch in first] == [4, 4, 4, 2]
    assert plan.draw(1, 0) == first
    assert plan.draw(1, 1) != first
    assert plan.draw(2, 0) != first
    random.seed(0)
    torch.manual_seed(0)
    numpy.random.seed(0)
    assert after == (torch.rand(1), random.random(), numpy.random.rand())


def test_a_plan_counts_what_its_sampler_draws():
    plan = Plan(size=9, batch_size=4, drop_last=True, sampler=Drawing(9, 14))
    assert (plan.samples, plan.batches, plan.steps) == (14, 3, 3)
    assert [len(batch) for batch in plan.draw(1, 0)] == [4, 4, 4]


def test_each_time_that_a_sample_comes_in_an_epoch_is_counted(every_rank):
    plan = Plan(size=3, batch_size=3, sampler=Fixed([2, 2, 0, 2, 1, 0]))
    assert [part.keys for part in plan.parts(1, 0)] == [
        [(2, 0), (2, 1), (0, 0)],
        [(2, 2), (1, 0), (0, 1)],
    ]
    parts = every_rank(3, lambda: list(plan.parts(1, 0)))
    assert [of_rank[1].keys for of_rank in parts] == [[(2, 2)], [(1, 0)], [(0, 1)]]


def test_a_batch_sampler_says_which_samples_come_together(every_rank):
    given = [[4, 1, 2], [0], [3, 3, 3, 3]]
    plan = Plan(size=5, batch_size=2, accumulate=2, batch_sampler=Fixed(given))
    assert plan.draw(1, 0) == given
    assert (plan.batches, plan.steps) == (3, 2)
    parts = list(plan.parts(1, 0))
    assert [part.share for part in parts] == [3 / 4, 1 / 4, 1.0]
    of_ranks = every_rank(2, lambda: list(plan.parts(1, 0)))
    assert [indices(of_rank[2]) for of_rank in of_ranks] == [[3, 3], [3, 3]]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"sampler": Fixed([0, 1], length=5)}, "Fixed says that it has 5 items and gave 2"),
        ({"sampler": Fixed([0, 1, 2], length=2)}, "Fixed says that it has 2 items and gave 3"),
        ({"sampler": Fixed([0, 7])}, "Fixed gave sample 7 of a data set of 5"),
        ({"sampler": Fixed([0, -1])}, "Fixed gave sample -1 of a data set of 5"),
        ({"batch_sampler": Fixed([[0]], length=2)}, "Fixed says that it has 2 items and gave 1"),
        ({"batch_sampler": Fixed([[0, 5]])}, "Fixed gave sample 5 of a data set of 5"),
        ({"batch_sampler": Fixed([[0], []])}, "Fixed gave an empty batch"),
    ],
)
def test_a_sampler_that_does_not_keep_its_word_is_a_data_error(parts, said):
    with pytest.raises(DataError, match=said):
        Plan(size=5, batch_size=2, **parts).draw(1, 0)
