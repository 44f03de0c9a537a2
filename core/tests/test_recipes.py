"""Everything a recipe may ask for at once: over processes, through a kill, sharded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.testing import run_processes

SCRIPT = Path(__file__).with_name("recipe_run.py")


def run_alone(folder: Path, *arguments: str) -> int:
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode not in (0, -9):
        raise AssertionError(finished.stdout + finished.stderr)
    return finished.returncode


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert run_alone(folder) == 0
    return folder / "recipe"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_processes(SCRIPT, str(folder), "stages.teach.parallel=fsdp")
    return folder / "recipe"


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.rglob("*.safetensors"))
    return {f"{f.relative_to(run)} {k}": v for f in files for k, v in load_file(f).items()}


def metrics(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(one: Path, other: Path) -> float:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[k].float() - theirs[k].float()).abs().max().item() for k in ours)


def test_a_run_writes_last_best_and_average(alone):
    names = {str(file.relative_to(alone)) for file in alone.rglob("*.safetensors")}
    kinds = ("last", "best", "ema")
    of_students = {f"{s}/{kind}.safetensors" for s in ("teach", "kd") for kind in kinds}
    assert names == {*of_students, "teach/mate.last.safetensors"}


def test_skipped_samples_are_told_with_their_reason(alone):
    epochs = [line for line in metrics(alone) if line["event"] == "epoch"]
    assert epochs[0]["skipped"].keys() == {"4", "5", "26"}
    assert "image 26 is truncated" in epochs[0]["skipped"]["26"]


def test_two_processes_give_what_one_gives_with_accumulation_average_and_mixing(alone, tmp_path):
    run_processes(SCRIPT, str(tmp_path))
    assert difference(alone, tmp_path / "recipe") < 1e-5
    for ours, theirs in zip(metrics(alone), metrics(tmp_path / "recipe"), strict=True):
        assert ours["event"] == theirs["event"]
        assert ours["step"] == theirs["step"]
        if ours["event"] == "epoch":
            assert ours["skipped"] == theirs["skipped"]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        if ours["event"] in ("epoch", "evaluation"):
            assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-5)


def test_a_nan_in_one_process_s_data_ends_all_before_the_step_with_its_sample(tmp_path):
    told = (
        r"stage 'teach', step \d: the term 'ce' is nan and .* on rank [01]; "
        r"the input of sample 7 is not"
    )
    with pytest.raises(RuntimeError, match=told):
        run_processes(SCRIPT, str(tmp_path), "datasets.train.params.nan=[7]")
    assert weights(tmp_path / "recipe") == {}


def test_sharded_processes_give_what_one_gives_and_whole_students(alone, sharded):
    assert difference(alone, sharded) < 1e-5


def test_a_killed_run_goes_on_to_the_same_bits(alone, tmp_path):
    assert run_alone(tmp_path, "stop=teach:2") == -9
    assert run_alone(tmp_path) == 0
    ours, theirs = weights(alone), weights(tmp_path / "recipe")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sharded_run_goes_on_to_the_same_bits(sharded, tmp_path):
    with pytest.raises(RuntimeError):
        run_processes(SCRIPT, str(tmp_path), "stages.teach.parallel=fsdp", "stop=kd:2")
    run_processes(SCRIPT, str(tmp_path), "stages.teach.parallel=fsdp")
    ours, theirs = weights(sharded), weights(tmp_path / "recipe")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
