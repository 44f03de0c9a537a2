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

PIECE = {"cpu": 2**20, "cuda": 2**26}
"""Bytes of the products that are taken together, by device type."""
FETCHED = {"cpu": 2**22, "cuda": 2**26}
"""Bytes of the rows that are fetched together."""
ROWS_OF_PRODUCTS = 64
"""Down to so many rows a processor multiplies a piece."""

Piece = tuple[slice, Tensor, Tensor]


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

    def ratios(self, embedding: Tensor, log_noise: Tensor) -> Iterator[Piece]:
        """Yield exp(product - log_noise) of embeddings (B, D) with their negatives, in pieces.

        Each with the samples it is of, as (n, b), and the rows, (n, D) for all of them or (b, n,
        D). It may be overwritten, and is by the next.
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
            # In this order both cores of a small machine take part.
            products = torch.mm(rows, narrow.T, out=space.like(rows, "products", *shape))
            # To copy what is of another type first takes no memory of its own each time.
            ratios = products
            if ratios.dtype != embedding.dtype:
                ratios = space.like(embedding, "ratios", *shape).copy_(products)
            factors = space.like(embedding, "factors", *shape)
            factors.copy_(marked[start : start + size].view(torch.uint8))
            yield slice(None), ratios.sub_(log_noise).exp_().mul_(factors), rows

    def _of_listed(
        self, embedding: Tensor, log_noise: Tensor, index: Tensor, kept: Tensor
    ) -> Iterator[Piece]:
        fetched = self._piece(FETCHED, self.rows.shape[1] * self.rows.element_size())
        negatives = min(index.shape[1], fetched)
        samples = max(1, fetched // negatives)
        narrow = embedding.to(self.rows.dtype)
        factors = kept.view(torch.uint8)
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
                wide = products.to(embedding.dtype).sub_(log_noise[some])
                yield some, wide.exp_().mul_(factors[some, start : start + negatives].T), rows

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
        for some, ratios, _ in negatives.ratios(embedding / temperature, torch.zeros_like(sums)):
            sums[some] += ratios.sum(0)
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
        for some, ratios, rows in negatives.ratios(embedding / temperature, noise.log()):
            spare = space.like(ratios, "spare", *ratios.shape)
            sums[some] += _log_sums(ratios, spare)
            weights = ratios.div_(torch.add(ratios, 1, out=spare))
            if weights.dtype != rows.dtype:
                weights = space.like(rows, "weights", *ratios.shape).copy_(weights)
            if rows.dim() == 2:
                gradient[some] += weights.T @ rows
            else:
                gradient[some] += torch.bmm(weights.T[:, None], rows)[:, 0]
        ctx.save_for_backward(gradient.div_(temperature))
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None], None, None, None


def _log_sums(ratios: Tensor, spare: Tensor) -> Tensor:
    """Return the sums of log(1 + ratio) over rows, using memory of the same shape.

    On a processor a logarithm costs twenty times what a product does, so it is taken of products,
    unless they leave the range of numbers.
    """
    if ratios.device.type == "cpu":
        sums = _products(ratios, spare).log1p().sum(0)
        if sums.isfinite().all():
            return sums
    return ratios.log1p().sum(0)


def _products(ratios: Tensor, spare: Tensor) -> Tensor:
    """Return the products of 1 + ratio of some rows each, less 1, without ever adding that 1."""
    while len(ratios) > ROWS_OF_PRODUCTS:
        half = len(ratios) // 2
        one, other, rest = ratios.split([half, half, len(ratios) % 2])
        ratios = torch.addcmul(one, one, other, out=spare[:half]).add_(other)
        ratios[: len(rest)] += rest + rest * ratios[: len(rest)]
    return ratios
