"""What the package offers to distill."""

from __future__ import annotations

import inspect
import re
import typing
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import distill_kd
from distill_kd import DISTLoss, KDLoss, MultiTeacherKDLoss, USKDLoss, VirtualTeacherLoss

WIRED_OTHERWISE = {
    MultiTeacherKDLoss: ["student", "teachers", "targets", "mask"],
    USKDLoss: ["student", "weak", "targets", "mask"],
    VirtualTeacherLoss: ["student", "targets", "mask"],
}


def test_offers_every_loss_of_the_package_under_the_name_of_its_class():
    names = {name for name in distill_kd.__all__ if name.endswith("Loss")}
    assert distill_kd.distill_losses() == {name: getattr(distill_kd, name) for name in names}
    files = Path(distill_kd.__file__).parent.glob("*.py")
    text = "\n".join(file.read_text("utf-8") for file in files)
    defined = set(re.findall(r"^class (\w+Loss)\(", text, re.M))
    assert defined - {"LogitLoss", "RowLoss", "LabelledLoss"} == names


def test_offers_the_presets_that_lie_in_the_package():
    assert hasattr(distill_kd.distill_presets, "distill_impl")
    offered = distill_kd.distill_presets()
    assert {"cifar100-kd", "cifar100-dkd", "imagenet-kd", "imagenet-dkd"} <= set(offered)
    assert all(file.read_text("utf-8").startswith("# ") for file in offered.values())


def test_offer_is_marked_as_a_hook_of_distill():
    assert hasattr(distill_kd.distill_losses, "distill_impl")


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
def test_every_constructor_parameter_has_a_default_and_a_type_to_check_against(loss, name, choices):
    hints = typing.get_type_hints(loss.__init__)
    parameters = list(inspect.signature(loss).parameters.values())
    assert all(p.default is not p.empty and p.name in hints for p in parameters)
    assert typing.get_args(hints[name]) == choices


def test_entry_point_names_the_package():
    found = {e.value for e in entry_points(group="distill") if e.name == "kd"}
    if not found:
        pytest.skip("distill-kd is on the path, not installed")
    assert found == {"distill_kd"}
