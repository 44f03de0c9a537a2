"""Noise contrast: the scores of many negatives, summed up with their gradient in one pass.

Nothing is kept of the scores, so memory does not grow with batch times negatives: they come in
pieces that fit into a processor's cache, and each piece gives its part of sum and gradient at once.
Memory that a piece needs is used again by the next: to ask for it anew costs as much as to fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill import once_differentiable

PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Bytes of the products that are taken together, by device type."""
FETCHED = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of the rows that are fetched together."""
ROWS_OF_PRODUCTS = 64
"""Down to so many rows a processor multiplies a piece."""

LARGEST_CHANCE = 0.9
"""Up to this a chance of one of several is as exact as that of none."""

Piece = tuple[slice, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Negatives:
    """Which rows of a bank are a sample's negatives: listed one by one, or marked among all.

    Marked ones cost a product with the whole bank, listed ones fetch each row by itself.

    Attributes:
        rows: the bank, (N, D), without gradient.
        count: how many there are for each sample, int64 (B).
        index: int64 (B, K), or ``None``.
        kept: which of them are negatives, bool (B, K); with ``index``.
        marked: bool (N, B), or ``None``.
    """

    rows: Tensor
    count: Tensor
    index: Tensor | None = None
    kept: Tensor | None = None
    marked: Tensor | None = None

    def scores(self, embedding: Tensor, log_noise: Tensor) -> Iterator[Piece]:
        """Yield product - log_noise of embeddings (B, D) with their negatives, in pieces.

        Each with the samples it is of, as (n, b), 1 for each negative among them and 0 for others,
        likewise, and the rows, (n, D) for all of them or (b, n, D), which may only be read. All are
        void with the next piece.
        """
        if self.marked is not None:
            yield from self._of_marked(embedding, log_noise, self.marked)
        else:
            assert self.index is not None
            assert self.kept is not None
            yield from self._of_listed(embedding, log_noise, self.index, self.kept)

    def _of_marked(self, embedding: Tensor, log_noise: Tensor, marked: Tensor) -> Iterator[Piece]:
        size = self._piece(PIECE, len(embedding) * self.rows.element_size())
        narrow = embedding.to(self.rows.dtype)
        space = _Space()
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            shape = len(rows), len(narrow)
            scores = space.like(embedding, "scores", *shape)
            # In this order both cores of a small machine take part.
            if rows.dtype == embedding.dtype:
                torch.addmm(log_noise, rows, narrow.T, beta=-1, out=scores)
            else:
                # To copy what is of another type first takes no memory of its own each time.
                products = torch.mm(rows, narrow.T, out=space.like(rows, "products", *shape))
                scores.copy_(products).sub_(log_noise)
            factors = space.like(embedding, "factors", *shape)
            factors.copy_(marked[start : start + size].view(torch.uint8))
            yield slice(None), scores, factors, rows

    def _of_listed(
        self, embedding: Tensor, log_noise: Tensor, index: Tensor, kept: Tensor
    ) -> Iterator[Piece]:
        fetched = self._piece(FETCHED, self.rows.shape[1] * self.rows.element_size())
        negatives = min(index.shape[1], fetched)
        samples = max(1, fetched // negatives)
        narrow = embedding.to(self.rows.dtype)
        space = _Space()
        for first in range(0, len(index), samples):
            some = slice(first, first + samples)
            for start in range(0, index.shape[1], negatives):
                chosen = index[some, start : start + negatives].flatten()
                rows = space.like(self.rows, "rows", len(chosen), self.rows.shape[1])
                torch.index_select(self.rows, 0, chosen, out=rows)
                if samples == 1:
                    products = rows @ narrow[some].T
                else:
                    rows = rows.view(len(narrow[some]), -1, rows.shape[1])
                    products = torch.bmm(rows, narrow[some, :, None])[..., 0].T
                scores = products.to(embedding.dtype).sub_(log_noise[some])
                yield some, scores, kept[some, start : start + negatives].T.to(scores.dtype), rows

    def _piece(self, sizes: Mapping[str, int], each: int) -> int:
        return max(1, sizes.get(self.rows.device.type, sizes["cpu"]) // each)


class _Space:
    """Memory for tensors of a name, asked for again only where they are wider or longer."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def like(self, tensor: Tensor, name: str, rows: int, columns: int) -> Tensor:
        """Return a tensor (rows, columns) of another's type, in the memory of this name."""
        known = self._tensors.get(name)
        if known is None or len(known) < rows or known.shape[1] != columns:
            known = self._tensors[name] = tensor.new_empty(rows, columns)
        return known[:rows]


def exponential_sums(embedding: Tensor, negatives: Negatives, temperature: float) -> Tensor:
    """Return the sum of exp(product / temperature) over each sample's negatives, (B)."""
    with torch.no_grad():
        sums = embedding.new_zeros(len(embedding))
        pieces = negatives.scores(embedding / temperature, torch.zeros_like(sums))
        for some, scores, factors, _ in pieces:
            sums[some] += scores.exp_().mul_(factors).sum(0)
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
        space = _Space()
        pieces = negatives.scores(embedding / temperature, noise.log())
        for some, scores, factors, rows in pieces:
            spare = space.like(scores, "spare", *scores.shape)
            # ratio / (1 + ratio), which the gradient is made of: the chance of being no noise.
            chances = torch.sigmoid(scores, out=spare).mul_(factors)
            weights = chances
            if weights.dtype != rows.dtype:
                weights = space.like(rows, "weights", *chances.shape).copy_(chances)
            if rows.dim() == 2:
                gradient[some] += weights.T @ rows
            else:
                gradient[some] += torch.bmm(weights.T[:, None], rows)[:, 0]
            sums[some] += _log_sums(scores, factors, chances)
        ctx.save_for_backward(gradient.div_(temperature))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None], None, None, None


def _log_sums(scores: Tensor, factors: Tensor, chances: Tensor) -> Tensor:
    """Return the sums of log(1 + exp(score)), times factors, over rows.

    On a processor a logarithm costs twenty times what a product does, so it is taken of products of
    1 - chance, unless they are so close to 0 that digits are lost.

    Args:
        scores: (n, b).
        factors: 0 or 1, (n, b).
        chances: of the scores, 0 for factors of 0, (n, b); it is overwritten.
    """
    if scores.device.type == "cpu":
        chances = _of_any(chances)
        if (chances <= LARGEST_CHANCE).all():
            return chances.neg_().log1p().sum(0).neg_()
    return softplus(scores, threshold=40).mul_(factors).sum(0)


def _of_any(chances: Tensor) -> Tensor:
    """Return the chance of at least one of some rows each, in the memory of the first ones.

    That is a + b (1 - a) for two, which keeps all digits of small ones.
    """
    certain = chances.new_ones(())
    while len(chances) > ROWS_OF_PRODUCTS:
        half = len(chances) // 2
        one, other, rest = chances[:half], chances[half : 2 * half], chances[2 * half :]
        torch.lerp(one, certain, other, out=one)
        if len(rest):
            one[:1].lerp_(certain, rest)
        chances = one
    return chances
