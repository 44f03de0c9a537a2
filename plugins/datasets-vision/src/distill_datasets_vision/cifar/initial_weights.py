"""How the networks of the CIFAR literature are initialised."""

from __future__ import annotations

from torch import nn


def initialise_convolutions(model: nn.Module) -> None:
    """Draw the weights of a k x k convolution from N(0, 2 / (k * k * outputs)); biases are 0.

    He et al. 2015, "Delving Deep into Rectifiers", eq. 14. The outputs count in full also where a
    convolution works in groups, as in the published code of all these networks.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_classifier(layer: nn.Linear) -> None:
    """Draw the weights from N(0, 0.01^2); the bias is 0."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
