"""What `distill check` does not wait for, seen in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "plugins/distill-kd/examples/digits-kd.yaml",
    ROOT / "plugins/datasets-vision/src/distill_datasets_vision/presets/imagenet-student.yaml",
]
CHECKED = """
import gc, json, sys
from distill.cli import main
from distill.without_dynamo import without_dynamo

for file in sys.argv[1:]:
    main(["check", file], standalone_mode=False)
slow = ("torch._dynamo", "torch._inductor", "sympy", "torch.utils.tensorboard", "onnxscript")
slow += ("distill.training.seed_run", "distill.data.loader")
told = {"slow": [name for name in slow if name in sys.modules], "collects": gc.isenabled()}

import torch, torchvision
from torchvision import tv_tensors
image = tv_tensors.Image(torch.ones(3, 2, 2))
told["wrapped"] = type(tv_tensors.wrap(torch.zeros(3, 2, 2), like=image)).__name__
told["still without"] = "torch._dynamo" not in sys.modules

with without_dynamo():
    left_alone = torch.compiler.disable(lambda x: x + 1)
    told["called"] = left_alone(1)
    import torch._dynamo.config as config
told["finders"] = sum("without_dynamo" in type(f).__module__ for f in sys.meta_path)
told["once"] = config is torch._dynamo.config and torch._dynamo.config.__spec__.origin is not None
told["utils"] = torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
asked = torchvision.ops.roi_align.__globals__["is_compile_supported"]
told["roi_align"] = asked("cpu") == torch._dynamo.utils.is_compile_supported("cpu")


def compiled(function):
    try:
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))
    except torch._dynamo.exc.Unsupported:
        return "kept out"
    return "compiled"


told["tv_tensors"] = compiled(lambda x: tv_tensors.wrap(x, like=image))
told["a function"] = compiled(lambda x: left_alone(x))
told["others"] = compiled(lambda x: x + 1)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, *map(str, FILES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *reports, facts = done.stdout.splitlines()
    assert len(reports) == len(FILES)
    assert all("no faults" in report for report in reports)
    return json.loads(facts)


def test_a_check_imports_no_compiler_and_nothing_that_writes_events_or_trains(
    told: dict[str, Any],
) -> None:
    assert told["slow"] == []


def test_garbage_is_collected_again_after_a_command(told: dict[str, Any]) -> None:
    assert told["collects"]


def test_torchvision_works_without_the_compiler(told: dict[str, Any]) -> None:
    assert told["wrapped"] == "Image"
    assert told["still without"]
    assert told["called"] == 2


def test_the_compiler_comes_whole_as_soon_as_it_is_asked_for(told: dict[str, Any]) -> None:
    assert told["once"]
    assert told["utils"]
    assert told["finders"] == 0
    assert told["roi_align"]


def test_the_compiler_keeps_out_of_what_it_was_asked_to_before(told: dict[str, Any]) -> None:
    assert told["tv_tensors"] == told["a function"] == "kept out"
    assert told["others"] == "compiled"


PLUGIN = """
import gc, os
from distill import hookimpl

gc.callbacks.append(lambda *_: os.write(1, b"collected\\n"))

@hookimpl
def distill_losses():
    return {"UnusedLoss": object}
"""


def checked(tmp_path: Path, *options: str) -> tuple[int, list[str]]:
    """Check the digits beside a plugin that tells of collections: exit status, lines."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    command = [sys.executable, "-m", "distill", "check", str(FILES[0]), "-p", str(plugin)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_a_check_collects_no_garbage_to_its_end(tmp_path: Path) -> None:
    status, lines = checked(tmp_path)
    assert status == 0
    assert any("no faults" in line for line in lines)
    assert "collected" not in lines


def test_a_check_of_data_collects_garbage(tmp_path: Path) -> None:
    status, lines = checked(tmp_path, "--data")
    assert status == 0
    assert "collected" in lines


def test_what_goes_on_after_a_check_collects_garbage(tmp_path: Path) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/__main__.py").write_text(
        "import gc, sys\n"
        "from distill.cli import main\n"
        "main(['check', sys.argv[1]], standalone_mode=False)\n"
        "sys.exit(3 if gc.isenabled() else 4)\n"
    )
    command = [sys.executable, "-m", "tool", str(FILES[0])]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 3
