"""Noise contrast: the scores of many negatives, summed up with their gradient in one pass.

Nothing is kept of the scores, so memory does not grow with batch times negatives: they come in
pieces that fit into a processor's cache, and each piece gives its part of sum and gradient at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Bytes of the largest tensor that a piece makes, by device type."""


Piece = tuple[slice, Tensor, Tensor]


@dataclass(frozen=True)
class Negatives:
    """Which rows of a bank are a sample's negatives: listed one by one, or marked among all.

    Marked ones cost a product with the whole bank, listed ones fetch each row by itself.

    Attributes:
        rows: the bank, (N, D), without gradient.
        index: int64 (B, K), or ``None``.
        marked: bool (B, N), or ``None``.
    """

    rows: Tensor
    index: Tensor | None = None
    marked: Tensor | None = None

    def count(self) -> Tensor:
        """Return how many there are for each sample, int64 (B)."""
        if self.marked is not None:
            return self.marked.sum(1)
        assert self.index is not None
        return torch.full_like(self.index[:, 0], self.index.shape[1])

    def ratios(self, embedding: Tensor, log_noise: Tensor) -> Iterator[Piece]:
        """Yield exp(product - log_noise) of embeddings (B, D) with their negatives, in pieces.

        Each with the samples it is of, (b, n), and the rows, (n, D) for all of them or (b, n, D).
        """
        if self.marked is not None:
            yield from self._of_marked(embedding, log_noise, self.marked)
        else:
            assert self.index is not None
            yield from self._of_listed(embedding, log_noise, self.index)

    def _of_marked(self, embedding: Tensor, log_noise: Tensor, marked: Tensor) -> Iterator[Piece]:
        size = self._piece(len(embedding) * embedding.element_size())
        narrow = embedding.to(self.rows.dtype)
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            products = (narrow @ rows.T).to(embedding.dtype).sub_(log_noise[:, None])
            yield slice(None), products.exp_().mul_(marked[:, start : start + size]), rows

    def _of_listed(self, embedding: Tensor, log_noise: Tensor, index: Tensor) -> Iterator[Piece]:
        fetched = self._piece(self.rows.shape[1] * self.rows.element_size())
        negatives = min(index.shape[1], fetched)
        samples = max(1, fetched // negatives)
        narrow = embedding.to(self.rows.dtype)
        for first in range(0, len(index), samples):
            some = slice(first, first + samples)
            for start in range(0, index.shape[1], negatives):
                chosen = index[some, start : start + negatives]
                rows = self.rows.index_select(0, chosen.flatten())
                if len(chosen) == 1:
                    products = narrow[some] @ rows.T
                else:
                    rows = rows.view(*chosen.shape, -1)
                    products = torch.bmm(rows, narrow[some, :, None])[..., 0]
                products = products.to(embedding.dtype).sub_(log_noise[some, None])
                yield some, products.exp_(), rows

    def _piece(self, each: int) -> int:
        return max(1, PIECE.get(self.rows.device.type, PIECE["cpu"]) // each)


def exponential_sums(embedding: Tensor, negatives: Negatives, temperature: float) -> Tensor:
    """Return the sum of exp(product / temperature) over each sample's negatives, (B)."""
    with torch.no_grad():
        sums = embedding.new_zeros(len(embedding))
        for some, ratios, _ in negatives.ratios(embedding / temperature, torch.zeros_like(sums)):
            sums[some] += ratios.sum(1)
    return sums


def log_noise_sums(
    embedding: Tensor, negatives: Negatives, temperature: float, noise: Tensor
) -> Tensor:
    """Return the sum of log(1 + exp(product / temperature) / noise) over negatives, (B).

    Args:
        embedding: (B, D), gets a gradient.
        negatives: of each sample.
        temperature: of the products.
        noise: (B), a constant.
    """
    sums: Tensor = _LogNoiseSums.apply(embedding, negatives, temperature, noise)
    return sums


class _LogNoiseSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, negatives: Negatives, temperature: float, noise: Tensor
    ) -> Tensor:
        sums = embedding.new_zeros(len(embedding))
        gradient = torch.zeros_like(embedding)
        for some, ratios, rows in negatives.ratios(embedding / temperature, noise.log()):
            sums[some] += ratios.log1p().sum(1)
            weights = ratios.div_(ratios + 1).to(rows.dtype)
            if rows.dim() == 2:
                gradient[some] += weights @ rows
            else:
                gradient[some] += torch.bmm(weights[:, None], rows)[:, 0]
        ctx.save_for_backward(gradient.div_(temperature))
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None], None, None, None
