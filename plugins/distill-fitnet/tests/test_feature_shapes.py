"""What shapes features may have, and what is said where they have others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill_fitnet.feature_shapes import channel_list, check_form, check_maps, check_same

OWNER = nn.Identity()


def test_channels_are_listed_whether_one_or_several():
    assert channel_list(OWNER, "channels", None) is None
    assert channel_list(OWNER, "channels", 3) == [3]
    assert channel_list(OWNER, "channels", (3, 5)) == [3, 5]


@pytest.mark.parametrize("channels", [0, [3, -1], []])
def test_channels_below_one_are_refused(channels):
    with pytest.raises(ValueError, match=r"Identity: channels must be a whole number >= 1.* got"):
        channel_list(OWNER, "channels", channels)


@pytest.mark.parametrize(
    ("dimensions", "wanted"),
    [
        ((4,), r"maps \(B, C, H, W\), got"),
        ((4, 2), r"maps \(B, C, H, W\) or vectors \(B, D\), got"),
        ((3,), r"tokens \(B, N, D\), got"),
    ],
)
def test_a_feature_of_another_form_is_refused(dimensions, wanted):
    for number in dimensions:
        check_form(OWNER, torch.zeros([1] * number), *dimensions)
    with pytest.raises(ValueError, match=rf"Identity: features must be {wanted} \(1, 1, 1, 1, 1\)"):
        check_form(OWNER, torch.zeros([1] * 5), *dimensions)


def test_features_of_different_shape_are_refused_with_advice():
    check_same(OWNER, torch.zeros(2, 3), torch.zeros(2, 3), "do this")
    message = r"Identity: student \(2, 3\) and teacher \(2, 4\) must have the same shape; do this"
    with pytest.raises(ValueError, match=message):
        check_same(OWNER, torch.zeros(2, 3), torch.zeros(2, 4), "do this")


def test_maps_may_differ_in_size_and_without_advice_in_channels():
    check_maps(OWNER, torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 5, 6), "do this")
    check_maps(OWNER, torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, 5, 6))


def test_maps_of_other_channels_are_refused_with_advice():
    message = r"student \(2, 3, 4, 4\) and teacher \(2, 7, 4, 4\) must have as many .*; do this"
    with pytest.raises(ValueError, match=message):
        check_maps(OWNER, torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, 4, 4), "do this")


@pytest.mark.parametrize("student", [(2, 3), (3, 3, 4, 4)])
def test_what_are_no_maps_of_the_same_batch_is_refused(student):
    with pytest.raises(ValueError, match=r"must be maps \(B, C, H, W\) of the same batch; capture"):
        check_maps(OWNER, torch.zeros(student), torch.zeros(2, 3, 4, 4))
