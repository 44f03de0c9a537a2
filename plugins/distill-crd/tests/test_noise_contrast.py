"""Sums over negatives in pieces are those over all of them, gradients included."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from distill_crd import noise_contrast
from distill_crd.noise_contrast import Negatives, exponential_sums, log_noise_sums


def vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def some_negatives(samples: int = 5, rows: int = 40, count: int = 11) -> torch.Tensor:
    return torch.stack(
        [
            torch.randperm(rows, generator=torch.Generator().manual_seed(n))[:count]
            for n in range(samples)
        ]
    )


def both_ways(bank: torch.Tensor, index: torch.Tensor) -> list[Negatives]:
    marked = torch.zeros(len(bank), len(index), dtype=torch.bool).scatter_(0, index.T, True)
    count = torch.full((len(index),), index.shape[1])
    return [
        Negatives(bank, count, index=index, kept=torch.ones_like(index).bool()),
        Negatives(bank, count, marked=marked),
    ]


def by_loops(
    embedding: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, noise: torch.Tensor, t: float
) -> torch.Tensor:
    sums = []
    for b in range(len(index)):
        terms = [torch.log(1 + torch.exp(bank[i] @ embedding[b] / t) / noise[b]) for i in index[b]]
        sums.append(sum(terms))
    return torch.stack(sums)


@pytest.mark.parametrize("piece", [8, 300, 1100, 2**19])  # 1100: two samples, and one left
@pytest.mark.parametrize("way", [0, 1], ids=["listed", "marked"])
def test_sums_and_gradients_are_those_of_loops(
    monkeypatch: pytest.MonkeyPatch, piece: int, way: int
) -> None:
    for sizes in (noise_contrast.PIECE, noise_contrast.FETCHED):
        monkeypatch.setitem(sizes, "cpu", piece)
    bank, index = vectors(40, 6), some_negatives()
    noise = torch.linspace(0.5, 3, 5, dtype=torch.float64)
    weight = torch.linspace(-1, 2, 5, dtype=torch.float64)
    ours, theirs = (vectors(5, 6, seed=1).requires_grad_() for _ in range(2))
    warnings.simplefilter("error")  # torch's, of memory of another shape than what is put there
    found = log_noise_sums(ours, both_ways(bank, index)[way], 0.3, noise)
    wanted = by_loops(theirs, bank, index, noise, 0.3)
    torch.testing.assert_close(found, wanted)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    sums = exponential_sums(ours, both_ways(bank, index)[way], 0.3)
    torch.testing.assert_close(sums, ((bank[index] @ theirs[..., None])[..., 0] / 0.3).exp().sum(1))


@pytest.mark.parametrize("way", [0, 1], ids=["listed", "marked"])
def test_gradients_are_those_of_finite_differences(way: int) -> None:
    negatives = both_ways(vectors(40, 6), some_negatives())[way]
    noise = torch.full((5,), 0.7, dtype=torch.float64)
    embedding = vectors(5, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: log_noise_sums(e, negatives, 0.5, noise), embedding)


@pytest.mark.parametrize("way", [0, 1], ids=["listed", "marked"])
def test_half_precision_rows_change_the_sum_by_their_rounding(way: int) -> None:
    bank, index = vectors(400, 64, dtype=torch.float32), some_negatives(rows=400, count=300)
    noise, embedding = torch.ones(5), vectors(5, 64, seed=1, dtype=torch.float32)
    exact, rounded = (
        log_noise_sums(embedding, both_ways(rows, index)[way], 0.1, noise)
        for rows in (bank, bank.bfloat16())
    )
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=0)
    assert not torch.equal(rounded, exact)


def test_a_sample_without_negatives_has_a_sum_of_zero() -> None:
    none = Negatives(vectors(7, 3), torch.zeros(2), marked=torch.zeros(7, 2, dtype=torch.bool))
    embedding = vectors(2, 3, seed=1).requires_grad_()
    found = log_noise_sums(embedding, none, 0.1, torch.ones(2, dtype=torch.float64))
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0]
    assert not embedding.grad.any()


@pytest.mark.parametrize("noise", [1e-30, 1e-3, 1.0, 1e4, 1e12])
def test_float32_keeps_its_digits_however_many_rows_and_however_likely(noise: float) -> None:
    bank, embedding = vectors(517, 6), vectors(3, 6, seed=1)
    marked = torch.rand(517, 3, generator=torch.Generator().manual_seed(2)) < 0.7
    scores = bank @ embedding.T / 0.3 - math.log(noise)
    wanted = (torch.nn.functional.softplus(scores) * marked).sum(0)
    slopes = (torch.sigmoid(scores) * marked).T @ bank / 0.3
    ours = embedding.float().requires_grad_()
    negatives = Negatives(bank.float(), marked.sum(0), marked=marked)
    found = log_noise_sums(ours, negatives, 0.3, torch.full((3,), noise))
    found.sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), slopes, rtol=3e-6, atol=3e-6 * slopes.max())
