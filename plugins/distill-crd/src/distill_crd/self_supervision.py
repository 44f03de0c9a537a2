"""Which image is this the rotation of? The task that SSKD teaches a head on the teacher's features.

In an experiment's file the first of two stages trains the head, on the teacher's side:

.. code-block:: yaml

    auxiliary:
      teacher_head: {type: SSKDHead, inputs: {features: teacher.avgpool}}
    criterion:
      rotations: {type: SelfSupervisionLoss, inputs: {embeddings: teacher_head}}
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.parameters import Parametrized, check, check_choice
from distill_crd.batch_scope import SCOPES, Scope, rows_in_scope
from distill_crd.divergence import wide
from distill_crd.view_rows import COPIES, split_views

SMALLEST = 1e-8
"""Norm up to which an embedding has no direction: similar to nothing, and without a gradient."""


class SSKDHead(Parametrized):
    """Embeds pooled features for the self-supervised task: Linear, ReLU, Linear, all of one width.

    Args:
        width: D; ``None`` takes it from what ``setup`` gets.

    Shape:
        - features: vectors (N, D), or maps (N, D, H, W), which are averaged over their positions.
        - returns: (N, D).

    Raises:
        ValueError: features of another width or form.
        RuntimeError: if called before its layers are built.

    Source: see ``SSKDLoss``.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        fits = width is None or width >= 1
        check(self, "width", width, fits, "a whole number >= 1, or None to find it")
        self.width = width
        self.layers = nn.Sequential()
        if width is not None:
            self._build(width)

    def setup(self, features: Tensor) -> None:
        """Build the layers for these features, or check that those already built fit them."""
        vectors = self._vectors(features)
        if not self.layers:
            self._build(vectors.shape[1])
        self.layers.to(features.device, torch.promote_types(features.dtype, torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings of features; see the class for shapes."""
        if not self.layers:
            raise RuntimeError(
                "SSKDHead has no layers yet: call setup with features, or give their width to the "
                "constructor"
            )
        vectors = self._vectors(features)
        embeddings: Tensor = self.layers(vectors.to(next(self.parameters()).dtype))
        return embeddings

    def _build(self, width: int) -> None:
        self.width = width
        self.layers.extend([nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)])

    def _vectors(self, features: Tensor) -> Tensor:
        if features.ndim not in (2, 4) or self.width not in (None, features.shape[1]):
            width = "D" if self.width is None else str(self.width)
            raise ValueError(
                f"SSKDHead: features must be vectors (N, {width}) or maps (N, {width}, H, W), got "
                f"{tuple(features.shape)}"
            )
        return features.mean((2, 3)) if features.ndim == 4 else features


class SelfSupervisionLoss(Parametrized):
    r"""Cross entropy of telling each transformed copy's own original from the other originals.

    .. math::
        L = -\frac{1}{3B} \sum_{i=1}^{3B} \log softmax_j(\cos(c_i, o_j))_{o(i)}

    ``o`` are the embeddings of the originals, ``c`` those of their copies and ``o(i)`` is the
    original that copy i is of. There is no temperature. No label is needed.

    The originals of a batch are the classes, so the loss depends on how many there are, and with
    ``gather: none`` on how many each process has. A batch of a single image has nothing to tell
    apart: its loss is 0, and says so in a warning.

    Args:
        gather: ``none`` compares with the originals of this process, as published numbers do,
            ``all`` with those of the global batch.

    Shape:
        - embeddings: (4B, D), each original before its three copies.
        - returns: scalar, computed in float32 or wider.

    Raises:
        ValueError: an unknown ``gather``; embeddings that are no vectors or do not come in fours.

    Equals torchdistill's ``AuxSSKDLoss``.

    Source: Xu, Liu, Li, Loy, *Knowledge Distillation Meets Self-Supervision*, ECCV 2020,
    https://arxiv.org/abs/2006.07114. With the authors' code, 30 epochs on ImageNet and 60 on
    CIFAR-100 train the teacher's head.
    """

    def __init__(self, gather: Scope = "none") -> None:
        super().__init__()
        check_choice(self, "gather", gather, SCOPES)
        self.gather = gather

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the loss of a batch as a scalar; see the class for shapes."""
        (embeddings,) = wide(embeddings)
        similarities = view_similarities(self, "embeddings", rows_in_scope(embeddings, self.gather))
        return F.cross_entropy(similarities, own_originals(similarities))


def view_similarities(owner: object, name: str, embeddings: Tensor) -> Tensor:
    """Return the cosine similarity of each copy with each original, (3B, B).

    Raises:
        ValueError: if embeddings are no vectors or do not come in fours.
    """
    if embeddings.ndim != 2:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be vectors (4B, D), got "
            f"{tuple(embeddings.shape)}; SSKDHead makes them of features"
        )
    originals, copies = split_views(owner, name, _unit_vectors(embeddings))
    if len(originals) == 1:
        warnings.warn(
            f"{type(owner).__name__}: a batch of one image has no other to tell its copies from: "
            "what compares them is 0 there; use a larger batch_size",
            stacklevel=2,
        )
    return copies.flatten(0, 1) @ originals.T


def own_originals(similarities: Tensor) -> Tensor:
    """Return for each row of similarities (3B, B) the column of its own original, int64 (3B)."""
    return torch.arange(len(similarities), device=similarities.device) // COPIES


def _unit_vectors(embeddings: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    return embeddings * norm.masked_fill(norm <= SMALLEST, math.inf).reciprocal()
