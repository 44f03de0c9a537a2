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

import distill_fitnet
from distill_fitnet import head_distillation

LOSSES = distill_fitnet.distill_losses()
AUXILIARY_MODULES = distill_fitnet.distill_auxiliary_modules()
OFFERED = {**LOSSES, **AUXILIARY_MODULES}
WITH_SETUP = [name for name, kind in OFFERED.items() if hasattr(kind, "setup")]
NOT_OFFERED = {"PairwiseLoss", "FittedLayers", "Bottleneck"}
"""What others derive from, and what is made by a redesigner."""

each_offer = pytest.mark.parametrize("name", OFFERED)


def defined_classes():
    """Return the public modules that the files of the package define, by name."""
    files = pkgutil.iter_modules(distill_fitnet.__path__, "distill_fitnet.")
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


@pytest.mark.parametrize("name", WITH_SETUP)
def test_setup_takes_what_forward_takes(name):
    setup, forward = (parameters_of(getattr(OFFERED[name], m)) for m in ("setup", "forward"))
    assert [(p.name, p.default) for p in setup] == [(p.name, p.default) for p in forward]


def test_every_auxiliary_module_finds_its_shapes_itself():
    assert set(WITH_SETUP) >= AUXILIARY_MODULES.keys()


def test_weights_of_layers_have_one_name():
    names = {p.name for kind in OFFERED.values() for p in parameters_of(kind)}
    assert "layer_weights" in names
    assert "weights" not in names


def test_offers_the_redesigner_that_puts_in_a_bottleneck():
    offered = {"bottlenecked": head_distillation.bottlenecked}
    assert distill_fitnet.distill_model_redesigners() == offered


def test_offers_the_presets_that_lie_in_the_package():
    offered = distill_fitnet.distill_presets()
    folder = Path(distill_fitnet.__file__).with_name("presets")
    assert set(offered) == {file.stem for file in folder.glob("*.yaml")}
    assert all(file.read_text("utf-8").startswith("# ") for file in offered.values())


def test_offers_are_marked_as_hooks_of_distill():
    hooks = [hook for name, hook in vars(distill_fitnet).items() if name.startswith("distill_")]
    hooks = [hook for hook in hooks if inspect.isfunction(hook)]
    assert len(hooks) == 4
    assert all(hasattr(hook, "distill_impl") for hook in hooks)


def test_everything_offered_can_be_imported_from_the_package():
    assert {*OFFERED, "bottlenecked"} <= set(distill_fitnet.__all__)
    assert all(hasattr(distill_fitnet, name) for name in distill_fitnet.__all__)


def test_entry_point_names_the_package():
    found = {e.value for e in entry_points(group="distill") if e.name == "fitnet"}
    if not found:
        pytest.skip("distill-fitnet is on the path, not installed")
    assert found == {"distill_fitnet"}
