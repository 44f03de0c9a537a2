"""What the package offers to distill."""

from __future__ import annotations

import inspect
import typing
from types import MappingProxyType

import pytest

import distill_kd
from distill.testing import OfferConformance
from distill_kd import DISTLoss, KDLoss, MultiTeacherKDLoss, USKDLoss, VirtualTeacherLoss

WIRED_OTHERWISE = {
    MultiTeacherKDLoss: ["student", "teachers", "targets", "mask"],
    USKDLoss: ["student", "weak", "targets", "mask"],
    VirtualTeacherLoss: ["student", "targets", "mask"],
}


class TestOffer(OfferConformance):
    package = distill_kd
    entry_point = "kd"
    inner = frozenset({"LogitLoss", "RowLoss", "LabelledLoss"})
    given = MappingProxyType({"CTKDLoss": {"ramp_steps": 10}})


def test_the_usual_recipes_are_among_the_presets():
    recipes = {"cifar100-kd", "cifar100-dkd", "imagenet-kd", "imagenet-dkd"}
    assert recipes <= distill_kd.distill_presets().keys()


@pytest.mark.parametrize("loss", distill_kd.LOSSES)
def test_forward_parameters_are_the_ones_distill_wires_by_itself(loss):
    expected = WIRED_OTHERWISE.get(loss, ["student", "teacher", "targets", "mask"])
    assert list(inspect.signature(loss.forward).parameters) == ["self", *expected]


@pytest.mark.parametrize(
    ("loss", "name", "choices"),
    [
        (DISTLoss, "gather", ("none", "all")),
        (DISTLoss, "eps_form", ("clamped", "added")),
        (KDLoss, "reduction", ("batchmean", "positionmean", "mean", "sum")),
    ],
)
def test_the_choices_of_a_parameter_are_its_type(loss, name, choices):
    assert typing.get_args(typing.get_type_hints(loss.__init__)[name]) == choices
