"""What the package offers to distill."""

import distill_crd
from distill.testing import OfferConformance


class TestOffer(OfferConformance):
    package = distill_crd
    entry_point = "crd"
    inner = frozenset({"Classes", "Pools"})
