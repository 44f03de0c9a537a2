"""Samplers under several processes: nothing lost, nothing doubled, every sample weighed alike."""

import random

import numpy
import pytest
import torch

from distill import DataError
from distill.data.plan import Plan

WORLDS = [1, 2, 3]


class Drawing:
    """A sampler that draws with repetition from torch, random and numpy."""

    def __init__(self, size, length):
        self.size, self.length = size, length

    def __len__(self):
        return self.length

    def __iter__(self):
        for _ in range(self.length):
            total = int(torch.randint(self.size, ())) + random.randrange(self.size)
            yield (total + int(numpy.random.randint(self.size))) % self.size


class Uneven:
    """A batch sampler whose batches have 1 to 7 samples, drawn with repetition."""

    def __init__(self, size, batches):
        self.size, self.batches = size, batches

    def __len__(self):
        return self.batches

    def __iter__(self):
        for number in range(self.batches):
            yield torch.randint(self.size, (1 + (3 * number) % 7,)).tolist()


class Lying:
    """Claims a length that it has not."""

    def __init__(self, items, length):
        self.items, self.length = items, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.items)


PLANS = {
    "permutation": lambda accumulate: Plan(23, 6, accumulate=accumulate),
    "sampler": lambda accumulate: Plan(9, 6, accumulate=accumulate, sampler=Drawing(9, 32)),
    "batch sampler": lambda accumulate: Plan(
        9, 6, accumulate=accumulate, batch_sampler=Uneven(9, 8)
    ),
}


def counted(part):
    """The keys of a part that count: none where there was nothing left for the process."""
    return part.keys[part.lead :] if part.share else []


@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", PLANS)
def test_processes_share_each_batch_out_in_its_order(every_rank, kind, world, lead):
    plan = PLANS[kind](1)
    of_ranks = every_rank(world, lambda: list(plan.parts(5, 1, lead)))
    whole = plan.draw(5, 1)
    assert {len(parts) for parts in of_ranks} == {len(whole)} == {plan.batches}
    for number, batch in enumerate(whole):
        shared = [key for parts in of_ranks for key in counted(parts[number])]
        assert [index for index, _ in shared] == batch
        sizes = [len(counted(parts[number])) for parts in of_ranks]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", PLANS)
def test_a_sample_that_comes_again_in_an_epoch_has_another_key_on_whatever_process(
    every_rank, kind, world
):
    plan = PLANS[kind](2)
    of_ranks = every_rank(world, lambda: list(plan.parts(5, 0)))
    keys = [key for parts in of_ranks for part in parts for key in counted(part)]
    assert len(set(keys)) == len(keys) == sum(map(len, plan.draw(5, 0)))
    assert sorted(keys) == sorted(key for part in plan.parts(5, 0) for key in part.keys)


def test_keys_count_the_times_a_sample_has_come_whatever_kind_of_number_says_so():
    plain = [[2, 2, 0], [2, 1, 0]]
    expected = [[(2, 0), (2, 1), (0, 0)], [(2, 2), (1, 0), (0, 1)]]
    for given in (numpy.array(plain), torch.tensor(plain)):
        for sampling in ({"sampler": Lying(given.ravel(), 6)}, {"batch_sampler": Lying(given, 2)}):
            parts = Plan(3, 3, **sampling).parts(1, 0)
            assert [part.keys for part in parts] == expected, (type(given), list(sampling))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("kind", PLANS)
def test_a_step_ends_after_so_many_batches_and_with_the_epoch(kind, accumulate):
    plan = PLANS[kind](accumulate)
    ends = [part.ends_step for part in plan.parts(5, 0)]
    last = len(ends) - 1
    assert ends == [(n + 1) % accumulate == 0 or n == last for n in range(len(ends))]
    assert plan.steps == sum(ends)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", PLANS)
def test_means_over_parts_weighed_by_their_shares_are_the_mean_of_the_steps_samples(
    every_rank, kind, world, accumulate
):
    plan = PLANS[kind](accumulate)
    losses = numpy.random.default_rng(0).normal(size=plan.size)
    of_ranks = every_rank(world, lambda: list(plan.parts(5, 0)))
    whole = plan.draw(5, 0)
    firsts = list(range(0, len(whole), accumulate))
    assert len(firsts) == plan.steps
    for first in firsts:
        numbers = range(first, min(first + accumulate, len(whole)))
        parts = [parts[number] for number in numbers for parts in of_ranks]
        mean = sum(p.share * losses[[i for i, _ in p.keys]].mean() for p in parts) / world
        samples = [index for number in numbers for index in whole[number]]
        assert mean == pytest.approx(losses[samples].mean())
        assert sum(part.share for part in parts) == pytest.approx(world)
        assert all(p.share == pytest.approx(len(counted(p)) * world / len(samples)) for p in parts)


@pytest.mark.parametrize("kind", PLANS)
def test_generators_are_left_as_they_were(kind):
    plan = PLANS[kind](1)

    def states():
        python, numpys = random.getstate(), numpy.random.get_state()
        return python, numpys[2], numpys[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = plan.draw(5, 0)
    assert states() == before
    list(plan.parts(5, 0))
    assert states() == before
    torch.rand(1), random.random(), numpy.random.rand()
    assert plan.draw(5, 0) == first
    assert plan.draw(5, 1) != first
    assert plan.draw(6, 0) != first


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"sampler": Lying([0, 1, 2], 4)}, "Lying says that it has 4 items and gave 3"),
        ({"sampler": Lying([0, 1, 2], 2)}, "Lying says that it has 2 items and gave 3"),
        ({"sampler": Lying([4, 5], 2)}, "Lying gave sample 5 of a data set of 5"),
        ({"batch_sampler": Lying([[0], [1]], 3)}, "Lying says that it has 3 items and gave 2"),
        ({"batch_sampler": Lying([[0], [1, -1]], 2)}, "Lying gave sample -1 of a data set of 5"),
        ({"batch_sampler": Lying([[0], []], 2)}, "Lying gave an empty batch"),
    ],
)
def test_a_sampler_that_breaks_its_word_is_named_on_every_process(every_rank, parts, said):
    plan = Plan(5, 2, **parts)

    def refusal():
        with pytest.raises(DataError) as caught:
            next(plan.parts(1, 0))
        return str(caught.value)

    assert all(refused.startswith(said) for refused in every_rank(3, refusal))


@pytest.mark.parametrize("parts", [{"sampler": [[0], [1]]}, {"batch_sampler": [0, 1]}])
def test_a_sampler_that_gives_something_else_than_samples_is_a_data_error_that_names_it(parts):
    lying = {key: Lying(items, 2) for key, items in parts.items()}
    with pytest.raises(DataError, match="Lying gave"):
        Plan(5, 2, **lying).draw(1, 0)
