"""Normal numbers on the meta device."""

from __future__ import annotations

import pytest
import torch

from distill.undrawn import Undrawn


def test_on_the_meta_device_tensors_stay_as_they_are() -> None:
    weight = torch.empty(2, 3, device="meta")
    with Undrawn():
        assert weight.normal_(0, 0.1) is weight
        assert torch.nn.init.kaiming_normal_(weight) is weight


def test_elsewhere_numbers_are_drawn_as_always() -> None:
    expected = torch.empty(5).normal_(1, 2, generator=torch.Generator().manual_seed(0))
    with Undrawn():
        drawn = torch.empty(5).normal_(1, 2, generator=torch.Generator().manual_seed(0))
    assert drawn.equal(expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_negative_deviation_is_refused(device: str) -> None:
    with Undrawn(), pytest.raises(RuntimeError, match="std >= 0"):
        torch.empty(2, device=device).normal_(0, -1.0)
