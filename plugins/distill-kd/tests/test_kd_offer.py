"""What the package offers to distill."""

from __future__ import annotations

import inspect
import typing
from importlib.metadata import entry_points

import pytest

import distill_kd
from distill_kd import KDLoss


def test_offers_kdloss_under_the_name_of_its_class():
    assert distill_kd.distill_losses() == {"KDLoss": KDLoss}


def test_offers_the_presets_that_lie_in_the_package():
    assert hasattr(distill_kd.distill_presets, "distill_impl")
    offered = distill_kd.distill_presets()
    assert set(offered) == {"cifar10-kd", "cifar100-kd", "imagenet-kd"}
    assert all(file.read_text("utf-8").startswith("# ") for file in offered.values())


def test_offer_is_marked_as_a_hook_of_distill():
    assert hasattr(distill_kd.distill_losses, "distill_impl")


def test_forward_parameters_are_the_ones_distill_wires_by_itself():
    parameters = inspect.signature(KDLoss.forward).parameters
    assert list(parameters) == ["self", "student", "teacher", "targets"]


def test_every_constructor_parameter_has_a_default_and_a_type_to_check_against():
    hints = typing.get_type_hints(KDLoss.__init__)
    parameters = list(inspect.signature(KDLoss).parameters.values())
    assert all(p.default is not p.empty and p.name in hints for p in parameters)
    assert typing.get_args(hints["reduction"]) == ("batchmean", "mean", "sum")


def test_entry_point_names_the_package():
    found = {e.value for e in entry_points(group="distill") if e.name == "kd"}
    if not found:
        pytest.skip("distill-kd is on the path, not installed")
    assert found == {"distill_kd"}
