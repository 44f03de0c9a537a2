"""Samples of other classes: which, how often, and when again."""

from __future__ import annotations

import pytest
import torch

from distill_crd.negatives import Classes, draw, draw_same, draw_shared, primes_above, scattered

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2, 2, 5, -1, -1])
"""Class 5 has a single sample, and the last two have no class."""
CHI_SQUARE = {11: 31.3, 54: 91.9}
"""Degrees of freedom -> what it exceeds once in a thousand times."""


def key(number: int) -> torch.Tensor:
    return torch.tensor(number)


def drawn(labels: torch.Tensor, sample: int, count: int, keys: int) -> torch.Tensor:
    """Return what is drawn for one sample with many keys, (keys, count)."""
    classes = Classes.found(labels)
    index = torch.tensor([sample])
    return torch.cat([draw(classes, index, count, key(number)) for number in range(keys)])


def is_other(labels: torch.Tensor, sample: int) -> torch.Tensor:
    """Return which samples may be drawn for one."""
    other = labels != labels[sample] if labels[sample] >= 0 else torch.ones(len(labels)).bool()
    other[sample] = False
    return other


@pytest.mark.parametrize("sample", range(len(LABELS)))
def test_negatives_are_all_those_of_other_classes_if_so_many_are_asked_for(sample: int) -> None:
    other = is_other(LABELS, sample)
    wanted = other.nonzero().flatten().tolist()
    for row in drawn(LABELS, sample, int(other.sum()), 20):
        assert row.sort().values.tolist() == wanted


def test_no_sample_comes_twice_while_there_are_enough() -> None:
    labels = torch.arange(5000) % 10
    classes, index = Classes.found(labels), torch.arange(0, 5000, 79)
    rows = draw(classes, index, 4000, key(7))
    assert all(len(row.unique()) == 4000 for row in rows)
    assert not (labels[rows] == labels[index, None]).any()


def test_each_other_sample_comes_equally_often() -> None:
    other = is_other(LABELS, 11)
    counts = drawn(LABELS, 11, 3, 4000).flatten().bincount(minlength=len(LABELS))[other]
    expected = 4000 * 3 / len(counts)
    assert ((counts - expected).square() / expected).sum() < CHI_SQUARE[11]


def test_each_pair_of_them_comes_about_equally_often() -> None:
    """Of 11 others: a prime, where distances meet every pair alike."""
    labels = torch.tensor([0, *[1] * 11])
    rows = drawn(labels, 0, 3, 9000).sort(1).values
    pairs = torch.cat([rows[:, [0, 1]], rows[:, [0, 2]], rows[:, [1, 2]]])
    counts = (pairs[:, 0] * 12 + pairs[:, 1]).unique(return_counts=True)[1]
    assert len(counts) == 55
    assert counts.float().std() / counts.float().mean() < 0.15


def test_classes_of_negatives_come_as_often_as_they_have_samples() -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((50, 500, 200, 1000))])
    rows = draw(Classes.found(labels), torch.arange(50), 400, key(3))
    shares = labels[rows].flatten().bincount(minlength=4) / rows.numel()
    torch.testing.assert_close(shares[1:], torch.tensor([500, 200, 1000]) / 1700, rtol=0, atol=0.02)
    assert shares[0] == 0


def test_what_is_drawn_depends_on_key_and_sample_and_not_on_the_rest_of_the_batch() -> None:
    classes = Classes.found(torch.arange(600) % 3)
    both = draw(classes, torch.tensor([4, 9]), 50, key(1))
    assert torch.equal(draw(classes, torch.tensor([9]), 50, key(1))[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(draw(classes, torch.tensor([9]), 50, key(2))[0], both[1])


def test_a_shared_draw_has_different_samples_of_any_class() -> None:
    classes = Classes.found(torch.arange(100) % 4)
    shared = draw_shared(classes, 60, key(5))
    assert len(shared.unique()) == 60
    assert draw_shared(classes, 200, key(5)).sort().values.tolist() == list(range(100))
    counts = torch.cat([draw_shared(classes, 10, key(k)) for k in range(3000)]).bincount()
    assert counts.min() > 200
    assert counts.max() < 400


def test_one_of_the_same_class_may_be_any_of_it() -> None:
    classes = Classes.found(LABELS)
    index = torch.tensor([0, 10])
    found = torch.stack([draw_same(classes, index, key(k)) for k in range(200)])
    assert set(found[:, 0].tolist()) == {0, 3, 6, 7}
    assert set(found[:, 1].tolist()) == {10}


def test_scattered_numbers_are_those_of_splitmix64() -> None:
    """Against whole numbers without bound."""
    for number in (0, 1, 12345, 2**62):
        z = (number + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        assert int(scattered(torch.tensor(number))) % 2**64 == z


def test_strides_are_primes_above_the_size() -> None:
    found = primes_above(50_000)
    assert found.min() == 50_021
    assert all((found % divisor).all() for divisor in range(2, 450))
