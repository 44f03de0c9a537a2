"""Every example trains on a device that is not the CPU, and its steps make nobody wait for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.forked import Forked

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "imitated_device.py"
PLUGINS = ["distill-kd", "distill-fitnet", "distill-crd", "distill-relational", "datasets-vision"]
TEACHER_OF_OTHERS = "digits-teacher"
PER_CLASS = 3
JUDGED_LATER = {"sharding.all_finite", "optimizer.step"}
"""Where CUDA's gradients are judged later, see core/tests/test_deferred_steps.py."""
FILLS = {"stored._to_host"}
"""Which on CUDA goes on behind the step."""
KNOWN = {"digits-kdsvd": {"singular_vectors.by_sample", "singular_vectors.leading_eigenvectors"}}
"""Losses that wait, as their docstrings say."""
FLIP = [{"type": "RandomHorizontalFlip"}]
CHANGES: dict[str, dict[str, Any]] = {
    "store": {"teacher": {"model": "big", "store": True}},
    "top_k": {"teacher": {"model": "big", "store": {"encoding": "top_k", "top": 3}}},
    "fast": {"teacher": {"model": "big", "fast": {"fold_batchnorm": True}}},
    "in memory": {"data": {"in_memory": True}, "transforms": FLIP},
    "views": {
        "teacher": {"model": "big", "store": True},
        "data": {"views": 2},
        "transforms": FLIP,
    },
    "mixed": {
        "data": {"batch_transforms": [{"type": "MixUpOrCutMix", "params": {"num_classes": 10}}]}
    },
    "accumulated": {"data": {"accumulate": 2}, "clip": {"norm": 1.0}, "ema": {"decay": 0.9}},
    "AdamW": {"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, "channels_last": True},
    "hint": {
        "criterion": {
            "hint": {
                "type": "MSELoss",
                "inputs": {"input": "student.block1", "target": "student.block1"},
            }
        }
    },
}
pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_examples_train_on_a_device_without_a_wait(plugin: str, tmp_path: Path) -> None:
    examples = {file.stem: file for file in ROOT.glob(f"plugins/{plugin}/examples/digits*.yaml")}
    order = sorted(examples, key=lambda name: (name != TEACHER_OF_OTHERS, name))
    files = {name: _shortened(yaml.safe_load(examples[name].read_text("utf-8"))) for name in order}
    found = _on_the_device(files, tmp_path)
    assert {name: error for name, (error, _) in found.items() if error} == {}
    waits = {name: seen - JUDGED_LATER for name, (_, seen) in found.items()}
    expected = {name: seen for name, seen in KNOWN.items() if name in files}
    assert {name: seen for name, seen in waits.items() if seen} == expected


def test_what_a_stage_can_ask_for_trains_on_a_device_without_a_wait(tmp_path: Path) -> None:
    files = {name: _changed(name.replace(" ", "-"), **CHANGES[name]) for name in CHANGES}
    found = _on_the_device(files, tmp_path)
    assert {name: error for name, (error, _) in found.items() if error} == {}
    assert {n: seen for n, (_, seen) in found.items() if seen - JUDGED_LATER - FILLS} == {}


def test_a_loss_that_waits_or_stays_on_the_cpu_is_found(tmp_path: Path) -> None:
    plugin = tmp_path / "beside.py"
    plugin.write_text(BESIDE)
    files = {name: _changed(name, criterion={"it": {"type": name}}) for name in ("Waits", "Stays")}
    found = _on_the_device(files, tmp_path, [plugin])
    error, waits = found["Waits"]
    assert (error, waits - JUDGED_LATER) == ("", {"beside.forward"})
    assert "on imitated and on the CPU, of shape (10,)" in found["Stays"][0]


BESIDE = """
import distill, torch
from torch import nn

class Waits(nn.Module):
    def forward(self, student):
        return student.mean() * (2 if student.max() > 0 else 1)

class Stays(nn.Module):
    def forward(self, student):
        return (student * torch.ones(10)).mean()

@distill.hookimpl
def distill_losses():
    return {"Waits": Waits, "Stays": Stays}
"""


def _shortened(described: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment that trains for a moment, and teaches though it has learned nothing."""
    described = {**described, "seeds": [0], "observers": []}
    described.pop("seed", None)
    for dataset in described["datasets"].values():
        few = {"type": "Subset", "params": {"per_class": PER_CLASS}}
        dataset["wrappers"] = [*dataset.get("wrappers", []), few]
    for stage in described["stages"]:
        if "epochs" in stage:
            stage["epochs"] = 1
        if stage.get("scheduler"):
            stage["scheduler"] = None
        for teacher in [stage.get("teacher"), *(stage.get("teachers") or {}).values()]:
            if isinstance(teacher, dict):
                teacher.pop("min_accuracy", None)
    return described


def _changed(name: str, transforms: Iterable[Any] = (), **stage: Any) -> dict[str, Any]:
    """Return an experiment of one stage on the digits, with other keys than usual."""
    data = {"train": "train", "validate": "val", "batch_size": 16, **stage.pop("data", {})}
    kd = {"type": "KDLoss", "params": {"temperature": 1.0, "alpha": 0.5}}
    return _shortened(
        {
            "name": name,
            "datasets": {
                "train": {
                    "type": "Digits",
                    "params": {"split": "train"},
                    "transforms": [*transforms],
                },
                "val": {"type": "Digits", "params": {"split": "validation"}},
            },
            "models": {"big": {"type": "DigitsTeacher"}, "small": {"type": "DigitsStudent"}},
            "stages": [
                {
                    "name": "kd",
                    "epochs": 1,
                    "data": data,
                    "teacher": {"model": "big"},
                    "student": {"model": "small"},
                    "criterion": {"kd": kd},
                    "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
                    **stage,
                }
            ],
        }
    )


def _on_the_device(
    files: dict[str, dict[str, Any]], folder: Path, plugins: Iterable[Path] = ()
) -> dict[str, tuple[str, set[str]]]:
    """Return the error that each experiment ended with, and where its steps waited."""
    for name, described in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(described, sort_keys=False), "utf-8")
    arguments = [*map(str, plugins), *(f"{name}.yaml" for name in files)]
    code, printed = Forked(str(SCRIPT), arguments, folder=folder).wait(600)
    assert code == 0, printed
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"file"')]
    return {line["file"]: (line["error"], set(line["waits"])) for line in lines}
