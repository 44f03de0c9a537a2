"""Rows of originals and copies."""

from __future__ import annotations

import pytest
import torch

from distill_crd.view_rows import SplitViews, check_views


def test_parts_hold_every_fourth_row_and_the_others_in_order():
    features = torch.arange(24.0).reshape(12, 2)
    parts = SplitViews()(features)
    assert parts["originals"].tolist() == features[[0, 4, 8]].tolist()
    assert parts["copies"].tolist() == features[[1, 2, 3, 5, 6, 7, 9, 10, 11]].tolist()


def test_maps_are_parted_too_and_gradients_pass():
    features = torch.randn(8, 3, 2, 2, requires_grad=True)
    parts = SplitViews()(features)
    assert parts["originals"].shape == (2, 3, 2, 2)
    assert parts["copies"].shape == (6, 3, 2, 2)
    (2 * parts["originals"].sum() + parts["copies"].sum()).backward()
    assert features.grad[:, 0, 0, 0].tolist() == [2, 1, 1, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("shape", [(6, 2), (0, 2), ()])
def test_rows_that_are_no_fours_are_refused(shape):
    with pytest.raises(ValueError, match=r"SplitViews: features must have rows in fours"):
        SplitViews()(torch.zeros(shape))


def test_rows_that_are_not_four_for_each_label_are_refused():
    check_views(SplitViews(), "logits", torch.zeros(8, 5), 2)
    with pytest.raises(ValueError, match=r"logits must have 4 rows for each of 8 labels.*\(8, 5\)"):
        check_views(SplitViews(), "logits", torch.zeros(8, 5), 8)
