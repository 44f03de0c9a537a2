"""Which of the teacher's answers are good enough to pass on: error-level ranking, as SSKD has it.

Everything stays on the device with shapes that do not depend on what is ranked, so that the host
waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def answer_ranks(scores: Tensor, answers: Tensor) -> Tensor:
    """Return at which place each row's right answer stands among its scores, int64 (N).

    0 if it has the highest score. Of equal scores the one of the lower index comes first, as in a
    stable sort.

    Args:
        scores: (N, K).
        answers: index of each row's right answer, int64 (N).
    """
    own = scores.gather(1, answers[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < answers[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def kept_rows(ranks: Tensor, ratio: float) -> Tensor:
    """Return a mask (N) of the rows to keep: all of rank 0, and of the others the best.

    Of the ``wrong`` rows of other ranks, ``int(wrong * ratio)`` are kept by increasing rank, and of
    equal ranks the first.
    """
    wrong = ranks.count_nonzero()
    # The product as Python would round it, and the nearest there is on a device without float64.
    wide = torch.float32 if ranks.device.type == "mps" else torch.float64
    count = len(ranks) - wrong + (wrong.to(wide) * ratio).to(torch.int64)
    places = torch.arange(len(ranks), device=ranks.device)
    best_first = ranks.argsort(stable=True)
    return torch.empty_like(ranks, dtype=torch.bool).scatter_(0, best_first, places < count)
