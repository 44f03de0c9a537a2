"""The angles of all triplets of vectors, compared in a bounded amount of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_relational.pair_distances import pair_matrices

CHUNK = 2**22
"""Angles that are looked at together; at least all those at one vertex."""
CHUNK_ON_CPU = 2**18
"""Fewer there, for what a core's cache holds is read faster."""
SMALLEST = 1e-12
"""Distance up to which two vectors count as one, between which there is no direction."""


def angle_difference(distances: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sum of smooth L1 distances of the cosines of all angles.

    With halves H of squared distances, the law of cosines gives the angle at j between i and k:
    (H_ji + H_jk - H_ik) / (d_ji d_jk), or 0 where i or k is at j. The vectors themselves are not
    needed, and so neither is their width. Where i is close to j, the numerator is a small
    difference of large squares, so it is added up in the type of the distances and then rounded.

    The gradient is computed together with the value, for max(2**22, B * B) angles at a time (2**18
    on a CPU), in four arrays of so many numbers, and one of the type of the distances if that is
    wider.

    Args:
        distances: of the student's and the teacher's pairs (2, B * (B - 1) / 2), float64 or well
            spread for angles in float32.
        batch: B.
        dtype: type in which angles are compared.

    Returns:
        The sum as a scalar, and its derivative by each of the student's squared distances (B, B),
        both of the type of the distances.
    """
    squares = pair_matrices(distances.square(), batch)
    inverse = torch.threshold(squares, SMALLEST**2, torch.inf).rsqrt_().to(dtype)
    halves = squares.div_(2)
    vertices = max(1, _chunk(halves) // max(1, batch * batch))
    shape = min(vertices, batch), batch, batch
    arrays = halves.new_empty(2, 2, *shape, dtype=dtype)
    wide = halves.new_empty(shape) if halves.dtype != dtype else None
    total, opposite = halves.new_zeros(()), halves.new_zeros(batch, batch)
    at_vertex, turned = sums = halves.new_empty(2, batch, batch, dtype=dtype)
    for start in range(0, batch, vertices):
        rows = slice(start, min(start + vertices, batch))
        products, cosines = arrays[:, :, : rows.stop - start]
        _write_cosines(halves, inverse, rows, wide, products, cosines)
        # What the teacher's arrays hold is not needed any more.
        (ours, slopes), (ours_times, difference) = products, cosines
        torch.sub(ours_times, difference, out=difference)
        torch.clamp(difference, -1, 1, out=slopes)
        # Half of the square up to 1, and the distance less a half beyond.
        difference.sub_(slopes, alpha=0.5)
        total += torch.dot(slopes.view(-1), difference.view(-1))
        student = arrays[:, 0, : rows.stop - start].mul_(slopes)
        # i and k can be exchanged, and sums over i are faster than those over k.
        torch.sum(student, 2, out=sums[:, rows])
        opposite += ours.sum(0)
    # Of the three squared distances in the numerator, then of the inverse roots.
    gradient = torch.sub(at_vertex, opposite, alpha=0.5)
    gradient.addcmul_(turned, inverse[0].square_(), value=-1)
    return total, gradient + gradient.mT


def _chunk(tensor: Tensor) -> int:
    return CHUNK_ON_CPU if tensor.device.type == "cpu" else CHUNK


def _write_cosines(
    halves: Tensor,
    inverse: Tensor,
    rows: slice,
    wide: Tensor | None,
    products: Tensor,
    cosines: Tensor,
) -> None:
    """Write both sides' angles at some vertices, and the products of their inverse distances."""
    at_vertex, roots = halves[:, rows], inverse[:, rows]
    to_first, to_second = at_vertex.unsqueeze(3), at_vertex.unsqueeze(2)
    if wide is None:
        torch.add(to_first, to_second, out=cosines).sub_(halves.unsqueeze(1))
    else:
        numerators = wide[: at_vertex.shape[1]]
        for side, out in enumerate(cosines):
            torch.add(to_first[side], to_second[side], out=numerators).sub_(halves[side])
            out.copy_(numerators)
    torch.mul(roots.unsqueeze(3), roots.unsqueeze(2), out=products)
    cosines *= products
