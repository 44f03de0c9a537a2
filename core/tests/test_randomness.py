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


INDEX, FIRST = torch.arange(4000), torch.zeros(4000, dtype=torch.long)


def test_numbers_of_a_batch_are_uniform_from_0_to_below_1():
    drawn = randomness.uniforms(5, INDEX, FIRST, 16)
    assert (drawn.dtype, drawn.shape) == (torch.float32, (4000, 16))
    assert (drawn.min() >= 0, drawn.max() < 1) == (True, True)
    counts = (drawn * 64).long().flatten().bincount(minlength=64).double()
    squared = ((counts - 1000).square() / 1000).sum()
    assert 63 - 5 * 11.2 < squared < 63 + 5 * 11.2  # chi squared, of 63 degrees of freedom
    per_column = (drawn < 0.5).sum(0)
    assert (per_column - 2000).abs().max() < 5 * 31.6


def test_numbers_of_columns_samples_repeats_and_bases_do_not_go_together():
    later = torch.ones_like(FIRST)
    drawn = randomness.uniforms(5, INDEX, FIRST, 4)
    others = [drawn.roll(1, 0), drawn.roll(1, 1)]  # the sample before, the column before
    others += [randomness.uniforms(5, INDEX, later, 4), randomness.uniforms(6, INDEX, FIRST, 4)]
    others += [randomness.uniforms(5, FIRST + 1, INDEX, 4)]
    for other in others:
        together = torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]
        assert abs(together) < 5 / drawn.numel() ** 0.5
        assert (drawn == other).double().mean() < 0.001


def test_numbers_depend_on_the_sample_and_not_on_its_batch():
    drawn = randomness.uniforms(5, INDEX, INDEX % 3, 4)
    chosen = torch.tensor([17, 3, 17, 3999])
    alone = randomness.uniforms(5, chosen, chosen % 3, 4)
    assert torch.equal(alone, drawn[chosen])
    assert torch.equal(randomness.uniforms(5, chosen, chosen % 3, 2), drawn[chosen, :2])
    assert randomness.uniforms(5, chosen, torch.tensor([-1, 0, 1, 2]), 0).shape == (4, 0)
    negative = randomness.uniforms(5, chosen[:2], torch.tensor([-1, -2]), 1)
    assert negative.unique().numel() == 2


def test_numbers_of_a_batch_never_change_between_versions():
    drawn = randomness.uniforms(7, torch.tensor([3]), torch.tensor([1]), 2)
    assert (drawn * 2**24).long().tolist() == [[2000454, 4022021]]


def test_a_seeded_block_asks_no_gpu_but_the_one_in_use(monkeypatch):
    asked = []
    state = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append(device))
    with randomness.seeded(3, "model"):
        pass
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    with randomness.seeded(3, "model"):
        pass
    assert asked == [5, 5]
