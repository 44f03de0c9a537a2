"""Ranks of right answers, and which rows are kept by them."""

from __future__ import annotations

import pytest
import torch

from distill_crd.error_levels import answer_ranks, kept_rows


def scores(rows, columns, seed=0):
    """Scores of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, (rows, columns), generator=generator).double()


def kept_by_hand(ranks, ratio):
    wrong = sum(rank > 0 for rank in ranks)
    count = len(ranks) - wrong + int(wrong * ratio)
    best = sorted(range(len(ranks)), key=lambda row: (ranks[row], row))[:count]
    return [row in best for row in range(len(ranks))]


def test_a_rank_is_the_place_in_a_stable_sort():
    given, answers = scores(40, 7), torch.arange(40) % 7
    order = given.argsort(dim=1, descending=True, stable=True).tolist()
    expected = [row.index(answer) for row, answer in zip(order, answers.tolist(), strict=True)]
    assert answer_ranks(given, answers).tolist() == expected
    assert len(set(expected)) == 7


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.5, 0.75, 1.0])
def test_all_right_rows_are_kept_and_the_best_of_the_others(ratio):
    for rows in (1, 4, 100, 101):
        ranks = torch.randint(6, (rows,), generator=torch.Generator().manual_seed(rows))
        assert kept_rows(ranks, ratio).tolist() == kept_by_hand(ranks.tolist(), ratio)


def test_the_number_of_kept_rows_is_rounded_as_python_does():
    ranks = torch.ones(100, dtype=torch.int64)
    assert int(100 * 0.29) == 28
    assert kept_rows(ranks, 0.29).sum() == 28


def test_of_equal_ranks_the_first_are_kept():
    kept = kept_rows(torch.tensor([2, 1, 0, 2, 1, 2]), 0.6)
    assert kept.tolist() == [True, True, True, False, True, False]


def test_nothing_may_be_kept():
    assert not kept_rows(torch.tensor([1, 2, 3]), 0.3).any()
