"""Negatives from a part of what is of other classes."""

from __future__ import annotations

import pytest
import torch

from distill_crd.negative_pools import Pools
from distill_crd.negatives import Classes

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2, 2, 5, -1, -1, 1, 1])
"""Class 5 has a single sample, and two samples have no class."""


def kept_of(pools: Pools, samples: list[int], number: int) -> list[list[int]]:
    numbers, kept, counts = pools.listed(torch.tensor(samples), torch.tensor(number))
    assert counts.tolist() == kept.sum(1).tolist()
    return [row[keeps].tolist() for row, keeps in zip(numbers, kept, strict=True)]


def pool_of(pools: Pools, sample: int) -> set[int]:
    """Return what is a negative of a sample sooner or later."""
    return {one for number in range(60) for one in kept_of(pools, [sample], number)[0]}


def is_other(sample: int) -> torch.Tensor:
    other = LABELS.ne(LABELS[sample]) if LABELS[sample] >= 0 else torch.ones(len(LABELS)).bool()
    other[sample] = False
    return other


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("sample", range(len(LABELS)))
def test_a_pool_is_that_part_of_the_samples_of_other_classes(sample: int, ratio: float) -> None:
    others = set(is_other(sample).nonzero().flatten().tolist())
    size = max(1, int(ratio * len(others)))
    all_of_it = kept_of(Pools(Classes(LABELS, 50), ratio), [sample], 0)[0]
    assert len(all_of_it) == len(set(all_of_it)) == size
    assert set(all_of_it) <= others


def test_samples_of_a_class_share_its_pool_and_classes_have_pools_of_their_own() -> None:
    pools = Pools(Classes(LABELS, 50), 0.5)
    assert pool_of(pools, 0) == pool_of(pools, 7)
    assert pool_of(pools, 0) - {1, 4, 13, 14} != pool_of(pools, 1) - {0, 3, 6, 7}


def test_few_of_a_pool_are_drawn_anew_for_each_sample_and_key() -> None:
    labels = torch.arange(1000) % 4
    pools = Pools(Classes(labels, 20), 0.2)
    whole = Pools(Classes(labels, 1000), 0.2)
    first, second, other = (
        *kept_of(pools, [8, 12], 1),
        kept_of(pools, [8], 2)[0],
    )
    of_class = set(kept_of(whole, [8], 0)[0])
    assert len(of_class) == 150
    for row in (first, second, other):
        assert len(set(row)) == 20
        assert set(row) < of_class
    assert len({tuple(sorted(row)) for row in (first, second, other)}) == 3


def test_enough_are_drawn_to_keep_as_many_as_asked_for_however_small_the_pool() -> None:
    labels = torch.cat([torch.zeros(300), torch.arange(1, 701)]).long()
    for ratio in (0.1, 0.25, 0.9):
        pools = Pools(Classes(labels, 60), ratio)
        for number in range(50):
            assert [len(row) for row in kept_of(pools, [0, 299, 300, 999], number)] == [60] * 4


def test_no_more_are_looked_at_for_a_smaller_pool() -> None:
    labels = torch.arange(20_000) % 100
    all_of_them, few = Classes(labels, 500).drawn, Pools(Classes(labels, 500), 0.05).drawn
    assert few < 1.2 * all_of_them


def test_each_of_a_pool_comes_equally_often() -> None:
    pools = Pools(Classes(LABELS, 2), 0.6)
    drawn = [one for number in range(4000) for one in kept_of(pools, [11], number)[0]]
    counts = torch.tensor(drawn).bincount(minlength=len(LABELS))
    counts = counts[counts > 0]
    assert len(counts) == int(0.6 * 14)
    expected = 8000 / len(counts)
    assert ((counts - expected).square() / expected).sum() < 24.3  # 7 degrees, once in a thousand


def test_each_sample_of_others_is_in_equally_many_pools() -> None:
    labels = torch.arange(60_000) // 2 % 500  # 120 of each of 500 classes
    pools = Pools(Classes(labels, 600), 0.01)
    samples = torch.arange(500) * 2
    numbers, kept, counts = pools.listed(samples, torch.tensor(0))
    assert counts.tolist() == [598] * 500
    spread = numbers[kept].bincount(minlength=60_000).float()
    # Binomial of 499 classes and 1 / 100: mean 4.98, variance 4.93.
    assert spread.var().item() == pytest.approx(4.93, rel=0.05)
