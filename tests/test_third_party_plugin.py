"""A stranger's method: written, installed with pip, found by its entry point, used in a run."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

METHOD = """
import distill
import torch
from torch import nn


class LogitMSELoss(nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.scale * (student - teacher).square().mean()


@distill.hookimpl
def distill_losses():
    return {"LogitMSELoss": LogitMSELoss}
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "distill-logit-mse"
version = "1.2.3"
dependencies = ["distill-core>=0.1,<0.2"]

[project.entry-points.distill]
logit-mse = "distill_logit_mse"

[tool.hatch.build.targets.wheel]
include = ["distill_logit_mse.py"]
"""
EXPERIMENT = """
name: third-party
datasets:
  few: {type: Digits, params: {labels_per_class: 5}}
models:
  big: {type: DigitsTeacher}
  small: {type: DigitsStudent}
stages:
  - name: kd
    epochs: 1
    data: {train: few, batch_size: 25}
    teacher: {model: big}
    student: {model: small}
    criterion: {mse: {type: LogitMSELoss, params: {scale: 0.5}}}
    optimizer: {type: SGD, params: {lr: 0.01}}
"""


def test_a_published_method_of_twenty_lines_is_found_and_used(tmp_path: Path) -> None:
    project, site = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    (project / "distill_logit_mse.py").write_text(textwrap.dedent(METHOD))
    (project / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "exp.yaml").write_text(EXPERIMENT)
    assert len([line for line in METHOD.splitlines() if line.strip()]) <= 20
    _install(project, site)

    listed = _distill(site, tmp_path, "plugins", "--json")
    record = next(r for r in json.loads(listed) if r["distribution"] == "distill-logit-mse")
    assert record["version"] == "1.2.3"
    assert record["components"] == {"losses": ["LogitMSELoss"]}

    printed = _distill(site, tmp_path, "run", "exp.yaml")
    assert "mse" in printed
    environment = json.loads((tmp_path / "runs/third-party/environment.json").read_text())
    used = {plugin["distribution"]: plugin["version"] for plugin in environment[-1]["plugins"]}
    assert used["distill-logit-mse"] == "1.2.3"


def _install(project: Path, site: Path) -> None:
    """Install into a folder of its own, so that the environment of the tests stays as it is."""
    command = ["install", "--quiet", "--no-deps", "--target", str(site), str(project)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)


def _distill(site: Path, folder: Path, *arguments: str) -> str:
    code = f"import sys; sys.path.append({str(site)!r}); from distill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
