"""Core's index of published plugins agrees with what they bring."""

from __future__ import annotations

import json
from pathlib import Path

import distill
from distill.registry import known_components

ROOT = Path(__file__).parents[1]


def test_every_component_of_a_shipped_plugin_is_known_by_its_package() -> None:
    """torchvision's names differ by version, so only what the index lacks or misplaces counts."""
    known = known_components()
    missing = [
        (record.distribution, kind, name)
        for record in distill.plugins().records
        if record.distribution in {"distill-kd", "distill-datasets-vision"}
        for kind, names in record.components.items()
        for name in names
        if known.get(kind, {}).get(name) != record.distribution and not _is_new_in_torchvision(name)
    ]
    assert not missing, "run python tests/known_components.py"


def _is_new_in_torchvision(name: str) -> bool:
    import torchvision

    return hasattr(torchvision.models, name) or hasattr(torchvision.datasets, name)


def test_the_index_names_no_package_that_is_not_in_the_repository() -> None:
    index = json.loads((ROOT / "core/src/distill/known_components.json").read_text("utf-8"))
    named = {p.parent.name for p in ROOT.glob("plugins/*/pyproject.toml")}
    assert {package.removeprefix("distill-") for package in index} == {
        name.removeprefix("distill-") for name in named
    }
