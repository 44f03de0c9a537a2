"""What a check without data says of a store and transforms that draw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import distill
from distill import ConfigError

CROP = {"type": "RandomCrop", "params": {"size": 8, "padding": 1}}


def checked(folder: Path, *transforms: Any, **data: Any) -> None:
    noise = {"size": 32, "image_size": [3, 8, 8]}
    stage = {
        "name": "kd",
        "epochs": 1,
        "data": {"train": "noise", "batch_size": 8, **data},
        "teacher": {"model": "deep", "store": True},
        "student": {"model": "thin"},
        "criterion": {"kd": {"type": "KDLoss"}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    described = {
        "name": "stored",
        "datasets": {
            "noise": {"type": "FakeData", "params": noise, "transforms": ["ToImage", *transforms]}
        },
        "models": {"deep": {"type": "resnet18"}, "thin": {"type": "resnet18"}},
        "stages": [stage],
    }
    file = folder / "stored.yaml"
    file.write_text(yaml.safe_dump(described))
    distill.check(distill.load(file))


def test_transforms_that_say_that_they_draw_are_refused_before_any_data_is_read(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ConfigError, match=re.escape("stages.kd.teacher.store: RandomCrop and Random")
    ):
        checked(tmp_path, CROP, "RandomHorizontalFlip")
    with pytest.raises(ConfigError, match=re.escape("RandomCrop draws random numbers in every")):
        checked(tmp_path, CROP)


def test_with_views_or_without_chance_they_are_not(tmp_path: Path) -> None:
    checked(tmp_path, CROP, "RandomHorizontalFlip", views=2)
    checked(tmp_path, {"type": "Resize", "params": {"size": 8}})
    checked(tmp_path, {"type": "RandomCrop", "params": {"size": 9}}, views=2)


def test_a_faulty_transform_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, {"type": "RandomCrop", "params": {"sise": 8}})
    assert len(caught.value.faults) == 1
