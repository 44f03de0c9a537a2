"""For tests of plugins: toy data and models, small experiments, and what a loss must pass.

Nothing here needs a network, a plugin package or more than a moment.
"""

from distill.testing.loss_conformance import LossConformance
from distill.testing.offer_conformance import OfferConformance
from distill.testing.processes import run_processes
from distill.testing.toy_experiment import toy_experiment, toy_registry
from distill.testing.toys import ToyConvNet, ToyData, ToyMLP

__all__ = [
    "LossConformance",
    "OfferConformance",
    "ToyConvNet",
    "ToyData",
    "ToyMLP",
    "run_processes",
    "toy_experiment",
    "toy_registry",
]
