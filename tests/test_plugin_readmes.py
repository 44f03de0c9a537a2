"""What the READMEs of the plugins show is valid, and runs where it is Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import distill
from distill.cli import main

READMES = sorted((Path(__file__).parents[1] / "plugins").glob("*/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAGE = {
    "name": "stage",
    "epochs": 1,
    "data": {"train": "train", "batch_size": 2},
    "teacher": {"model": "wide"},
    "student": {"model": "thin"},
    "criterion": {"ce": {"type": "CrossEntropyLoss"}},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}
"""What a stage of a README may leave out."""
LARGE, SMALL = {"type": "resnet34"}, {"type": "resnet18"}
EXPERIMENT = {
    "name": "readme",
    "datasets": {"train": {"type": "FakeData"}},
    "models": {"wide": LARGE, "large": LARGE, "thin": SMALL, "small": SMALL},
    "stages": [STAGE],
}


def blocks(*languages: str) -> list[Any]:
    """Return a README and a block's text for each block in one of these languages."""
    return [
        pytest.param(readme, text, id=f"{readme.parent.name}-{number}")
        for readme in READMES
        for number, (language, text) in enumerate(BLOCK.findall(readme.read_text("utf-8")))
        if language in languages
    ]


@pytest.mark.parametrize(("readme", "text"), blocks("yaml"))
def test_a_yaml_block_makes_an_experiment_without_faults(
    readme: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "type: timm" in text:
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    monkeypatch.chdir(tmp_path)
    _make_files_of(readme)
    experiment = whole(fragment_of(readme, text))
    Path("exp.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False), "utf-8")
    done = CliRunner().invoke(main, ["check", "exp.yaml"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("readme", "text"), blocks("python"))
def test_a_python_block_runs(
    readme: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _make_files_of(readme)
    exec(compile(text, str(readme), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("readme", "text"), blocks("sh", "console"))
def test_a_command_is_one_that_exists(readme: Path, text: str) -> None:
    described = (readme.parent / "pyproject.toml").read_text("utf-8")
    project = re.findall(r'^name = "(.+)"$', described, re.MULTILINE)[0]
    for line in text.splitlines():
        program, command, *arguments = shlex.split(line.removeprefix("$ "), comments=True)
        assert program in ("pip", "distill")
        if program == "distill":
            is_group = isinstance(main.commands.get(command), click.Group)
            named = [command, arguments[0]] if is_group else [command]
            done = CliRunner().invoke(main, [*named, "--help"])
            assert done.exit_code == 0, done.output
            options = [argument for argument in arguments if argument.startswith("-")]
            assert all(re.search(rf"(^|[ ,]){option}\b", done.output) for option in options)
        else:
            assert command == "install"
            assert all(name.startswith(("distill-core", project)) for name in arguments)


def test_every_readme_of_a_plugin_is_read() -> None:
    assert len(READMES) >= 3
    assert len(blocks("yaml")) >= 10
    assert len(blocks("python")) >= 3


def fragment_of(readme: Path, text: str) -> dict[str, Any]:
    """Return what a block holds; if it is indented, the one before with other keys in its end."""
    fragment: dict[str, Any] = yaml.safe_load(text)
    if not text.startswith(" "):
        return fragment
    texts = [text for language, text in BLOCK.findall(readme.read_text("utf-8"))]
    before = fragment_of(readme, texts[texts.index(text) - 1])
    before["stages"][-1].update(fragment)
    return before


def whole(fragment: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment that holds a README's: datasets, models and stages, or one stage."""
    if not fragment.keys() & EXPERIMENT.keys() - {"name"}:
        fragment = {"stages": [fragment]}
    named = {
        kind: {**EXPERIMENT[kind], **fragment.get(kind, {})} for kind in ("datasets", "models")
    }
    stages = [with_defaults(stage) for stage in fragment.get("stages", [STAGE])]
    return {**EXPERIMENT, **fragment, **named, "stages": stages}


def with_defaults(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a stage with what it needs besides."""
    given = {**STAGE, **stage, "data": {**STAGE["data"], **stage.get("data", {})}}
    if "teachers" in stage:
        del given["teacher"]
    return given


def _make_files_of(readme: Path) -> None:
    """Write the files that a README speaks of as already there."""
    if "ckpt_epoch_240.pth" in readme.read_text("utf-8"):
        teacher = distill.plugins().find("models", "cifar_resnet32x4").factory()
        torch.save({"model": teacher.state_dict()}, "ckpt_epoch_240.pth")
