"""The heads that CRD learns beside both networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import Parametrized, check


class CRDEmbedding(Parametrized):
    """Features to unit vectors, by a linear layer.

    Args:
        out_features: length of the vectors, the same for student and teacher.

    Shape:
        - features: (B, D), or (B, ...), which is flattened; D is found in two samples.
        - returns: (B, out_features), each row of length 1.

    Source: the head of CRD, see ``CRDLoss``.
    """

    def __init__(self, out_features: int = 128) -> None:
        super().__init__()
        check(self, "out_features", out_features, out_features > 0, "a whole number > 0")
        self.out_features = out_features

    def setup(self, features: Tensor) -> None:
        """Build the layer for features like these."""
        self.linear = nn.Linear(features.flatten(1).shape[1], self.out_features)
        self.linear.to(features.device)

    def forward(self, features: Tensor) -> Tensor:
        """Return unit vectors."""
        return F.normalize(self.linear(features.flatten(1)), dim=1)
