"""What losses that relate the samples of a batch by their logits share."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from distill import gather as global_rows
from distill_kd.logits import Rows

Gather = Literal["none", "all"]


def gathered(rows: Rows) -> Rows:
    """Return the rows of all processes, in their order."""
    return rows.each(global_rows)


def check_related(owner: object, what: str, count: int, most: int, remedy: str) -> None:
    """Refuse to relate more rows or classes than memory has room for.

    Raises:
        ValueError: with what could be done instead.
    """
    if count > most:
        raise ValueError(
            f"{type(owner).__name__} relates every two {what} to each other, at most {most:,}; got "
            f"{count:,}; {remedy}"
        )


def share_of_unsure_samples(rows: Rows) -> Tensor:
    """Return how much of a batch the teacher is no surer of than of half of it, a scalar.

    That is the part of the samples whose largest probability, at temperature 1, is at most the
    median, between two halfway: 1/2, or more in an odd batch or where some are equal.
    """
    return rows.mean(unsure_samples(rows))


def unsure_samples(rows: Rows) -> Tensor:
    """Return 1 where the teacher's largest probability is at most their median, else 0, (N)."""
    confidence = rows.teacher.softmax(1).amax(1)
    if rows.counted is not None:
        confidence = confidence.where(rows.counted, math.nan)
    return (confidence <= confidence.nanquantile(0.5)).to(confidence.dtype)


def share_of_unlikely_classes(rows: Rows) -> Tensor:
    """Return the part of the classes that are no likelier in a batch than half of them, a scalar.

    What is compared with its median is the sum of the teacher's probabilities at temperature 1.
    """
    probabilities = rows.teacher.softmax(1)
    if rows.counted is not None:
        probabilities = probabilities.where(rows.counted[:, None], 0.0)
    found = probabilities.sum(0)
    return (found <= torch.quantile(found, 0.5)).to(found.dtype).mean()
