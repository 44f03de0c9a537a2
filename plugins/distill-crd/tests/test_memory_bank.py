"""Rows that a bank begins with."""

import pytest
import torch

from distill_crd import memory_bank
from distill_crd.memory_bank import random_rows

CPU = torch.device("cpu")


def rows_with(threads, monkeypatch, seed=0, count=1000):
    monkeypatch.setattr(memory_bank, "DRAWN_APART", 64)
    monkeypatch.setattr(memory_bank, "FILLED_AT_ONCE", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(seed)
    return random_rows(count, 16, torch.float32, CPU)


def test_they_depend_on_the_seed_and_not_on_the_number_of_threads(monkeypatch):
    alone = rows_with(1, monkeypatch)
    assert torch.equal(alone, rows_with(3, monkeypatch))
    assert not torch.equal(alone, rows_with(1, monkeypatch, seed=1))


def test_no_two_are_alike_and_they_are_uniform(monkeypatch):
    rows = rows_with(2, monkeypatch)
    assert len(rows.unique(dim=0)) == 1000
    bound = (16 / 3) ** -0.5
    assert rows.abs().max() <= bound
    assert rows.norm(dim=1).square().mean().sub(1).abs() < 0.03
    assert rows.mean().abs() < 0.02 * bound
    quarters = (rows / bound).histc(4, -1, 1) / rows.numel()
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("width", [1, 5, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_width_and_type_have_length_1_on_average(width, dtype):
    torch.manual_seed(0)
    rows = random_rows(5003, width, dtype, CPU)
    assert rows.shape == (5003, width)
    assert rows.dtype == dtype
    assert rows.float().square().sum(1).mean().sub(1).abs() < 0.05
    assert rows.float().mean(0).abs().max() < 0.05 * (width / 3) ** -0.5
