import random

import numpy
import torch

from distill import randomness

CPU = torch.device("cpu")


def draws():
    return torch.rand(1).item(), random.random(), float(numpy.random.rand())


def test_derived_seeds_depend_on_every_part_of_the_position():
    positions = [(1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0), (1, "a"), (1, "a", "0")]
    seeds = [randomness.derive(*position) for position in positions]
    assert len(set(seeds)) == len(positions)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_never_change_between_versions():
    assert randomness.derive(7, "order", 0) == 5134589803398401830


def test_a_sample_draws_the_same_from_all_three_generators_wherever_it_is_read():
    randomness.seed_sample(1, 2, 3)
    first = draws()
    draws()
    randomness.seed_sample(1, 2, 3)
    assert draws() == first


def test_samples_epochs_and_repetitions_draw_differently():
    drawn = set()
    for epoch, index, repeat in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)]:
        randomness.seed_sample(1, epoch, index, repeat)
        drawn.update(draws())
    assert len(drawn) == 18


def test_a_step_draws_the_same_from_torch_whatever_was_drawn_before():
    randomness.seed_step(99, 5, CPU)
    first = torch.rand(3)
    torch.rand(3)
    randomness.seed_step(99, 5, CPU)
    assert torch.equal(torch.rand(3), first)


def test_steps_draw_differently_also_where_the_sum_overflows():
    drawn = set()
    for base, step in [(0, 0), (0, 1), (12345, 0), (2**63 - 1, 3)]:
        randomness.seed_step(base, step, CPU)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 4


def test_seeded_block_draws_from_its_position_and_leaves_the_generators_as_they_were():
    randomness.seed_sample(1, 0, 0)
    undisturbed = draws()
    randomness.seed_sample(1, 0, 0)
    with randomness.seeded(3, "model"):
        first = draws()
    assert draws() == undisturbed
    with randomness.seeded(3, "model"):
        assert draws() == first
