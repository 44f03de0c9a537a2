"""What the package offers to distill."""

import inspect

import pytest

import distill_relational
from distill.testing import OfferConformance

LOSSES = distill_relational.distill_losses()
RELATES_SAMPLES = set(LOSSES) - {"FSPLoss"}


class TestOffer(OfferConformance):
    package = distill_relational
    entry_point = "relational"
    inner = frozenset({"BatchRelationLoss", "RelationalLoss"})


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_whether_it_depends_on_the_batch_of_one_process(name):
    text = " ".join(inspect.getdoc(LOSSES[name]).split())
    assert "depend on the batch of one process" in text or "Depends on the batch" in text
    gathers = "gather" in inspect.signature(LOSSES[name]).parameters
    assert gathers == (name in RELATES_SAMPLES)
    assert ("gather: all" in text) == gathers
