"""What a wrong file prints is what distill-fitnet's README shows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

import distill

README = Path(__file__).parents[1] / "plugins" / "distill-fitnet" / "README.md"
VIT = {
    "type": "VisionTransformer",
    "params": dict.fromkeys(("num_layers", "num_heads"), 2)
    | {"image_size": 8, "patch_size": 4, "hidden_dim": 8, "mlp_dim": 8, "num_classes": 10},
}
PROJECTION = "student.encoder.layers.encoder_layer_0.self_attention.out_proj"


def _file(**criterion: Any) -> dict[str, Any]:
    stage = {
        "name": "kd",
        "epochs": 1,
        "data": {"train": "train", "batch_size": 8},
        "teacher": {"model": "wide"},
        "student": {"model": "thin"},
        "criterion": criterion,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    grey = {"type": "Grayscale", "params": {"num_output_channels": 3}}
    return {
        "name": "wrong",
        "datasets": {
            "train": {"type": "Digits", "params": {"split": "train"}},
            "rgb": {"type": "Digits", "params": {"split": "train"}, "transforms": [grey]},
        },
        "models": {
            "wide": {"type": "DigitsTeacher"},
            "thin": {"type": "DigitsStudent"},
            "vit": VIT,
        },
        "stages": [stage],
    }


def _at(layer: str) -> dict[str, Any]:
    inputs = {"student_features": layer, "teacher_features": "teacher.block2"}
    return {"at": {"type": "ATLoss", "inputs": inputs}}


def _wrong_path() -> dict[str, Any]:
    return _file(**_at("student.blok2"))


def _never_run() -> dict[str, Any]:
    inputs = {"input": PROJECTION, "target": "student.heads"}
    file = _file(hint={"type": "MSELoss", "inputs": inputs})
    del file["stages"][0]["teacher"]
    file["stages"][0]["data"]["train"] = "rgb"
    file["stages"][0]["student"] = {"model": "vit"}
    return file


def _mismatch() -> dict[str, Any]:
    inputs = {"input": "student.flatten", "target": "teacher.flatten"}
    return _file(l2={"type": "MSELoss", "inputs": inputs})


def _name_twice() -> dict[str, Any]:
    file = _file(**_at("student.block2"))
    paraphraser = {"type": "Paraphraser", "inputs": {"features": "teacher.block3"}}
    first, second = file["stages"][0], copy.deepcopy(file["stages"][0])
    first["name"], second["name"] = "paraphraser", "ft"
    first["auxiliary"] = {"paraphraser": paraphraser}
    second["auxiliary"] = {"paraphraser": {**paraphraser}}
    file["stages"] = [first, second]
    return file


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            _wrong_path(),
            "'student.blok2': DigitsStudent has no module 'blok2'; did you mean block2",
        ),
        (_never_run(), f"'{PROJECTION.partition('.')[2]}' did not run in the model's forward"),
        (
            _mismatch(),
            "MSELoss failed on input=student.flatten (2, 128), target=teacher.flatten (2, 256): "
            "their shapes differ; 'adapter: auto' on the term brings the student's shapes to the "
            "teacher's",
        ),
        (
            _name_twice(),
            "stage 'paraphraser' has an auxiliary module 'paraphraser' already; write "
            "{reuse: paraphraser} to go on with it, or call the new one otherwise",
        ),
    ],
    ids=["path", "never run", "mismatch", "name twice"],
)
def test_a_mistake_is_told_as_the_readme_shows(
    tmp_path: Path, file: dict[str, Any], said: str
) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(yaml.safe_dump(file))
    with pytest.raises(distill.ConfigError) as caught:
        distill.check(distill.load(path), data=True)
    (fault,) = caught.value.faults
    assert said in fault.message
    assert fault.location is not None
    assert said in README.read_text("utf-8")
