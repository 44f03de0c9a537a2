"""What the package offers to distill."""

import inspect

import distill_fitnet
from distill.testing import OfferConformance
from distill_fitnet import head_distillation

MODULES = {**distill_fitnet.distill_losses(), **distill_fitnet.distill_auxiliary_modules()}


class TestOffer(OfferConformance):
    package = distill_fitnet
    entry_point = "fitnet"
    inner = frozenset({"PairwiseLoss", "FittedLayers", "Bottleneck"})


def test_every_auxiliary_module_finds_its_shapes_itself():
    assert all(
        hasattr(kind, "setup") for kind in distill_fitnet.distill_auxiliary_modules().values()
    )


def test_weights_of_layers_have_one_name():
    names = {name for kind in MODULES.values() for name in inspect.signature(kind).parameters}
    assert "layer_weights" in names
    assert "weights" not in names


def test_offers_the_redesigner_that_puts_in_a_bottleneck():
    offered = {"bottlenecked": head_distillation.bottlenecked}
    assert distill_fitnet.distill_model_redesigners() == offered
    assert offered.keys() <= set(distill_fitnet.__all__)
