"""Features as vectors: averages over positions, norms, distances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_fitnet.vectors import as_vectors, unit_vectors, vector_distance


def test_maps_become_their_averages_and_vectors_stay():
    maps = torch.arange(8.0).view(1, 2, 2, 2)
    assert as_vectors(nn.Identity(), maps).tolist() == [[1.5, 5.5]]
    vectors = torch.ones(2, 3)
    assert as_vectors(nn.Identity(), vectors) is vectors
    with pytest.raises(ValueError, match=r"Identity: features must be maps .* got \(2, 3, 4\)"):
        as_vectors(nn.Identity(), torch.ones(2, 3, 4))


def test_zeros_are_a_unit_vector_of_zeros():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    units = unit_vectors(vectors)
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    units[1].sum().backward()
    assert vectors.grad.abs().max() <= 1


@pytest.mark.parametrize(("p", "expected"), [(1, [3 / 7, 4 / 7]), (2, [0.6, 0.8])])
def test_vectors_are_divided_by_the_norm_asked_for(p, expected):
    vectors = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(unit_vectors(vectors, p), torch.tensor([expected]))
    torch.testing.assert_close(unit_vectors(vectors.T, p, dim=0), torch.tensor([expected]).T)


@pytest.mark.parametrize(
    ("p", "reduction", "expected"), [(1, "mean", 2.0), (1, "sum", 8.0), (2, "mean", 3.0)]
)
def test_a_distance_is_over_elements_or_over_samples_norms(p, reduction, expected):
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert vector_distance(student, torch.zeros(2, 2), p, reduction).item() == expected
