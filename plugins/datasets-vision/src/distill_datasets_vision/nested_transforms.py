"""torchvision's transforms of transforms, which an experiment file writes as components."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torchvision.transforms import v2
from torchvision.transforms.v2 import Transform  # type: ignore[attr-defined]

from distill_datasets_vision.transforms import torchvision_transforms

Components = Sequence[str | Mapping[str, Any]]
"""``{type: ColorJitter, params: {brightness: 0.4}}`` each, or a bare name."""


def RandomApply(transforms: Components, p: float = 0.5) -> Transform:
    """Return ``v2.RandomApply``: all of ``transforms`` with probability ``p``, or none."""
    return v2.RandomApply(_built(transforms), p=p)  # type: ignore[attr-defined]


def RandomChoice(transforms: Components, p: list[float] | None = None) -> Transform:
    """Return ``v2.RandomChoice``: one of ``transforms``, drawn with the weights ``p``."""
    return v2.RandomChoice(_built(transforms), p=p)  # type: ignore[attr-defined]


def RandomOrder(transforms: Components) -> Transform:
    """Return ``v2.RandomOrder``: all of ``transforms``, in an order that is drawn."""
    return v2.RandomOrder(_built(transforms))  # type: ignore[attr-defined]


def _built(components: Components) -> list[Transform]:
    """Build transforms; their parameters are passed on as they stand: numbers, lists, text.

    Raises:
        ValueError: if a component is none, or its name is unknown.
    """
    offered = torchvision_transforms()
    built = []
    for component in components:
        given: dict[str, Any] = (
            {"type": component} if isinstance(component, str) else dict(component)
        )
        if not isinstance(given.get("type"), str) or given.keys() - {"type", "params"}:
            raise ValueError(f"expected {{type: Name, params: {{...}}}} or a name, got {component}")
        name = given["type"]
        if name not in offered:
            near = " or ".join(difflib.get_close_matches(name, offered, n=2))
            raise ValueError(
                f"there is no transform '{name}'" + (f"; did you mean {near}?" if near else "")
            )
        built.append(offered[name](**given.get("params", {})))
    return built
