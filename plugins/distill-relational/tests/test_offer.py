"""What the package offers to distill."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torch import nn

import distill_relational

LOSSES = distill_relational.distill_losses()
AUXILIARY_MODULES = distill_relational.distill_auxiliary_modules()
OFFERED = {**LOSSES, **AUXILIARY_MODULES}
NOT_OFFERED = {"BatchRelationLoss", "RelationalLoss"}
"""What others derive from."""
RELATES_SAMPLES = set(LOSSES) - {"FSPLoss"}

each_offer = pytest.mark.parametrize("name", OFFERED)


def defined_classes():
    """Return the public modules that the files of the package define, by name."""
    files = pkgutil.iter_modules(distill_relational.__path__, "distill_relational.")
    found = {}
    for module in [importlib.import_module(file.name) for file in files]:
        for name, kind in vars(module).items():
            own = isinstance(kind, type) and kind.__module__ == module.__name__
            if own and issubclass(kind, nn.Module) and not name.startswith("_"):
                found[name] = kind
    return found


def parameters_of(function):
    return list(inspect.signature(function).parameters.values())


def test_every_public_module_of_the_package_is_offered_under_its_name():
    defined = defined_classes()
    assert defined.keys() >= NOT_OFFERED
    assert {name: kind for name, kind in defined.items() if name not in NOT_OFFERED} == OFFERED


def test_losses_are_told_from_auxiliary_modules_by_their_names():
    assert all(name.endswith("Loss") for name in LOSSES)
    assert not any(name.endswith("Loss") for name in AUXILIARY_MODULES)


@each_offer
def test_every_constructor_parameter_has_a_default_and_a_type_to_check_against(name):
    hints = typing.get_type_hints(OFFERED[name].__init__)
    for parameter in parameters_of(OFFERED[name]):
        assert parameter.default is not parameter.empty, parameter.name
        assert parameter.name in hints


@each_offer
def test_printing_shows_every_constructor_parameter(name):
    names = [parameter.name for parameter in parameters_of(OFFERED[name])]
    shown = repr(OFFERED[name]())
    assert all(f"{parameter}=" in shown for parameter in names)


@each_offer
def test_inputs_are_named_one_by_one(name):
    kinds = {parameter.kind for parameter in parameters_of(OFFERED[name].forward)}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", AUXILIARY_MODULES)
def test_setup_takes_what_forward_takes(name):
    setup, forward = (parameters_of(getattr(OFFERED[name], m)) for m in ("setup", "forward"))
    assert [(p.name, p.default) for p in setup] == [(p.name, p.default) for p in forward]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_whether_it_depends_on_the_batch_of_one_process(name):
    text = " ".join(inspect.getdoc(LOSSES[name]).split())
    assert "depend on the batch of one process" in text or "Depends on the batch" in text
    gathers = "gather" in {parameter.name for parameter in parameters_of(LOSSES[name])}
    assert gathers == (name in RELATES_SAMPLES)
    assert ("gather: all" in text) == gathers


def test_offers_the_presets_that_lie_in_the_package():
    offered = distill_relational.distill_presets()
    folder = Path(distill_relational.__file__).with_name("presets")
    assert set(offered) == {file.stem for file in folder.glob("*.yaml")}
    assert offered
    assert all(file.read_text("utf-8").startswith("# ") for file in offered.values())


def test_offers_are_marked_as_hooks_of_distill():
    hooks = [hook for name, hook in vars(distill_relational).items() if name.startswith("distill_")]
    hooks = [hook for hook in hooks if inspect.isfunction(hook)]
    assert len(hooks) == 3
    assert all(hasattr(hook, "distill_impl") for hook in hooks)


def test_everything_offered_can_be_imported_from_the_package():
    assert set(OFFERED) <= set(distill_relational.__all__)
    assert all(hasattr(distill_relational, name) for name in distill_relational.__all__)


def test_entry_point_names_the_package():
    found = {e.value for e in entry_points(group="distill") if e.name == "relational"}
    if not found:
        pytest.skip("distill-relational is on the path, not installed")
    assert found == {"distill_relational"}
