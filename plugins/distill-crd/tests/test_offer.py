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

import distill_crd

LOSSES = distill_crd.distill_losses()
AUXILIARY_MODULES = distill_crd.distill_auxiliary_modules()
MODULES = {**LOSSES, **AUXILIARY_MODULES}
OFFERED = {**MODULES, **distill_crd.distill_dataset_wrappers()}
NOT_OFFERED = {"Classes", "Pools"}
"""What others are made of."""


def defined_modules():
    """Return the public modules that the files of the package define, by name."""
    files = pkgutil.iter_modules(distill_crd.__path__, "distill_crd.")
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
    defined = defined_modules()
    assert {name: kind for name, kind in defined.items() if name not in NOT_OFFERED} == MODULES


def test_losses_are_told_from_auxiliary_modules_by_their_names():
    assert all(name.endswith("Loss") for name in LOSSES)
    assert not any(name.endswith("Loss") for name in AUXILIARY_MODULES)


@pytest.mark.parametrize("name", OFFERED)
def test_every_constructor_parameter_has_a_default_and_a_type_to_check_against(name):
    hints = typing.get_type_hints(OFFERED[name].__init__)
    for parameter in parameters_of(OFFERED[name]):
        if parameter.name != "dataset":
            assert parameter.default is not parameter.empty, parameter.name
            assert parameter.name in hints


@pytest.mark.parametrize("name", MODULES)
def test_printing_shows_every_constructor_parameter(name):
    names = [parameter.name for parameter in parameters_of(MODULES[name])]
    shown = repr(MODULES[name]())
    assert all(f"{parameter}=" in shown for parameter in names)


@pytest.mark.parametrize("name", MODULES)
def test_inputs_are_named_one_by_one(name):
    kinds = {parameter.kind for parameter in parameters_of(MODULES[name].forward)}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_offers_the_presets_that_lie_in_the_package():
    folder = Path(distill_crd.__file__).with_name("presets")
    offered = distill_crd.distill_presets()
    assert set(offered) == {file.stem for file in folder.glob("*.yaml")}
    assert all(file.read_text("utf-8").startswith("# ") for file in offered.values())


def test_offers_are_marked_as_hooks_of_distill():
    hooks = [hook for name, hook in vars(distill_crd).items() if name.startswith("distill_")]
    hooks = [hook for hook in hooks if inspect.isfunction(hook)]
    assert len(hooks) == 4
    assert all(hasattr(hook, "distill_impl") for hook in hooks)


def test_everything_offered_can_be_imported_from_the_package():
    assert set(OFFERED) <= set(distill_crd.__all__)
    assert all(hasattr(distill_crd, name) for name in distill_crd.__all__)


def test_entry_point_names_the_package():
    found = {e.value for e in entry_points(group="distill") if e.name == "crd"}
    if not found:
        pytest.skip("distill-crd is on the path, not installed")
    assert found == {"distill_crd"}
