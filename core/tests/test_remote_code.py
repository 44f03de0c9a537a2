"""What fetches code from elsewhere and runs it is built only where the user allows that."""

import re
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

import distill
from distill.cli import main
from distill.errors import ConfigError, UsageError
from distill.experiment_check import check_to_run
from distill.inspection import models_of_file, named_model
from distill.model_evaluation import evaluate
from distill.testing import ToyMLP, toy_experiment, toy_registry
from distill.trained import Choice, trained_model
from distill.training.build import Builder
from distill.training.check import check, refusals

PLUGIN = """\
from pathlib import Path
from distill import hookimpl
from distill.testing import ToyMLP

def far_model(repo: str, hidden: int = 8):
    with Path("ran.txt").open("a") as file:
        file.write(f"{repo}\\n")
    return ToyMLP(hidden)

far_model.remote_code = lambda params: f"github.com/{params['repo']} at 0123abc"

@hookimpl
def distill_models():
    return {"far_model": far_model, "ToyMLP": ToyMLP}

@hookimpl
def distill_datasets():
    from distill.testing import ToyData
    return {"ToyData": ToyData}
"""
STAGES = [
    {"name": "alone", "epochs": 1},
    {
        "name": "hint",
        "teacher": {"model": "far"},
        "criterion": {
            "hint": {
                "type": "MSELoss",
                "inputs": {"input": "student.body", "target": "teacher.body"},
            }
        },
    },
]
MODELS = {"mlp": {"type": "ToyMLP"}, "far": {"type": "far_model", "params": {"repo": "a/b"}}}
SAID = "far_model runs code from github.com/a/b at 0123abc; allow it with --allow-remote-code"


class Far:
    """A factory that counts its calls and says what it runs."""

    def __init__(self, build=ToyMLP, describe=lambda params: f"github.com/{params['repo']}"):
        self.calls, self.build, self.remote_code = 0, build, describe

    def __call__(self, *provided, repo: str = "a/b", **params):
        self.calls += 1
        return self.build(*provided, **params)


@pytest.fixture
def command(tmp_path, monkeypatch, only_core):
    """Run a command on an experiment whose teacher comes from elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far.py").write_text(PLUGIN)
    toy_experiment(tmp_path, *STAGES, models=MODELS)

    def invoke(name, *arguments):
        return CliRunner().invoke(main, [name, "-p", "far.py", *arguments])

    return invoke


def far_experiment(folder):
    return toy_experiment(folder, *STAGES, models=MODELS)


def ran(folder):
    return (folder / "ran.txt").exists()


def test_check_lists_what_would_run_and_finds_no_fault_in_it(command, tmp_path):
    result = command("check", "toy.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "toy.yaml: no faults (2 stages, 2 models); data and checkpoints not opened, see --data",
        f"remote code: models.far: {SAID}; what uses it is not checked",
    ]
    assert not ran(tmp_path)


def test_check_looks_into_the_model_where_it_is_allowed(command, tmp_path):
    result = command("check", "toy.yaml", "--allow-remote-code")
    assert result.exit_code == 0
    assert (
        result.stdout
        == "toy.yaml: no faults (2 stages, 2 models); data and checkpoints not opened, see --data\n"
    )
    assert ran(tmp_path)
    wrong = ("-s", "stages.hint.criterion.hint.inputs.target=teacher.bdy")
    assert command("check", "toy.yaml", *wrong).exit_code == 0
    result = command("check", "toy.yaml", *wrong, "--allow-remote-code")
    assert result.exit_code == 2
    assert "ToyMLP has no module 'bdy'; did you mean body" in result.stderr


def test_other_faults_are_told_without_the_refusal(command, tmp_path):
    result = command("check", "toy.yaml", "-s", "stages.alone.optimizer.params.lrr=1")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "there is no parameter 'lrr'" in result.stderr
    result = command("run", "toy.yaml", "-s", "stages.alone.optimizer.params.lrr=1")
    assert result.stderr.count("\n") == 2
    assert SAID in result.stderr
    result = command("check", "toy.yaml", "-s", "models.far.params={}")
    assert result.stderr.count("\n") == 1
    assert "the parameter 'repo' is missing" in result.stderr
    assert not ran(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "toy.yaml"],
        ["run", "toy.yaml", "--processes", "2"],
        ["check", "toy.yaml", "--data"],
        ["eval", "toy.yaml", "--model", "far"],
        ["inspect", "toy.yaml"],
        ["inspect", "toy.yaml", "--input", "4"],
    ],
)
def test_commands_that_would_run_it_refuse_at_its_place(command, tmp_path, arguments):
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"toy\.yaml:\d+:\d+: models\.far: {re.escape(SAID)}\n", result.stderr)
    assert not ran(tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_model_by_name_is_refused_too(command, tmp_path):
    given = ["far_model", "--input", "4", "--param", "repo=a/b"]
    result = command("inspect", *given)
    assert (result.exit_code, result.stderr) == (2, f"error: {SAID}\n")
    assert not ran(tmp_path)
    shown = command("inspect", *given, "--allow-remote-code")
    assert "far_model: (2, 4) -> (2, 3)" in shown.stdout


def test_allowed_commands_run_it(command, tmp_path):
    allow = "--allow-remote-code"
    assert command("check", "toy.yaml", "--data", allow).exit_code == 0
    result = command("run", "toy.yaml", allow)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs/toy/hint/last.safetensors").exists()
    assert command("eval", "runs/toy").exit_code == 0  # its student is no code from elsewhere
    assert SAID in command("eval", "runs/toy", "--model", "teacher").stderr
    assert command("eval", "runs/toy", "--model", "teacher", allow).exit_code == 0
    assert "far: (2, 4) -> (2, 3)" in command("inspect", "toy.yaml", allow).stdout


def test_the_flag_is_handed_on_to_several_processes(command, monkeypatch):
    handed_on = []
    monkeypatch.setattr("distill.launcher.launch", lambda n, line: handed_on.append((n, line)))
    line = ["run", "-p", "far.py", "toy.yaml", "--allow-remote-code", "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["distill", *line])
    command("run", "toy.yaml", "--allow-remote-code", "--processes", "2")
    assert handed_on == [(2, ["run", "-p", "far.py", "toy.yaml", "--allow-remote-code"])]


def test_several_processes_run_it(command, tmp_path):
    """Through the launcher itself, since it is the processes that need the permission."""
    line = ["run", "-p", "far.py", "toy.yaml", "--allow-remote-code", "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "distill", *line], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/toy/hint/last.safetensors").exists()


def test_python_users_allow_it_by_an_argument(tmp_path):
    far = Far()
    registry, experiment = toy_registry(models={"far_model": far}), far_experiment(tmp_path)
    distill.check(experiment, registry)
    for refused in (
        lambda: distill.check(experiment, registry, data=True),
        lambda: distill.run(experiment, registry=registry, runs=tmp_path),
        lambda: check_to_run(experiment, registry, allow_remote_code=False),
        lambda: trained_model(experiment, registry, Choice("far"), None),
        lambda: models_of_file(experiment, registry, "far", [4]),
        lambda: Builder(experiment, registry).model("far", 0),
    ):
        with pytest.raises(ConfigError, match=r"far_model runs code from github\.com/a/b; allow"):
            refused()
    with pytest.raises(UsageError, match=r"far_model runs code from github\.com/a/b; allow"):
        named_model(registry, "far_model", ["repo=a/b"], [4])
    assert far.calls == 0
    distill.check(experiment, registry, data=True, allow_remote_code=True)
    result = distill.run(experiment, registry=registry, runs=tmp_path, allow_remote_code=True)
    assert far.calls > 0
    assert isinstance(result.student(), ToyMLP)


def test_a_student_from_elsewhere_is_loaded_as_its_run_was_allowed(tmp_path):
    registry = toy_registry(models={"far_model": Far()})
    experiment = toy_experiment(tmp_path, {"student": {"model": "far"}}, models=MODELS)
    result = distill.run(experiment, registry=registry, runs=tmp_path, allow_remote_code=True)
    assert isinstance(result.student(), ToyMLP)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("datasets", "datasets.val"),
        ("losses", "stages.stage0.criterion.ce"),
        ("metrics", "stages.stage0.metrics[0]"),
        ("optimizers", "stages.stage0.optimizer"),
        ("schedulers", "stages.stage0.scheduler"),
        ("samplers", "stages.stage0.data.sampler"),
        ("transforms", "datasets.val.transforms[0]"),
        ("observers", "observers[0]"),
    ],
)
def test_a_component_of_any_kind_is_listed_and_refused(tmp_path, kind, where):
    part = {"type": "Far", "params": {"repo": "x/y"}}
    datasets = {name: {"type": "ToyData"} for name in ("train", "val")}
    datasets["val"] |= {"datasets": part, "transforms": {"transforms": [part]}}.get(kind, {})
    stage = {
        "losses": {"criterion": {"ce": part}},
        "metrics": {"metrics": [part]},
        "optimizers": {"optimizer": part},
        "schedulers": {"scheduler": part},
        "samplers": {"data": {"train": "train", "batch_size": 4, "sampler": part}},
    }.get(kind, {})
    observers = [part] if kind == "observers" else []
    experiment = toy_experiment(tmp_path, stage, datasets=datasets, observers=observers)
    far = Far()
    registry = toy_registry(**{kind: {"Far": far}})
    assert check(experiment, registry) == []
    (refused,) = refusals(experiment, registry)
    assert refused.path == where
    assert refused.message.startswith("Far runs code from github.com/x/y; allow it with")
    with pytest.raises(ConfigError, match="Far runs code from"):
        distill.run(experiment, registry=registry, runs=tmp_path)
    assert far.calls == 0


def test_evaluation_refuses_data_from_elsewhere(tmp_path):
    far = Far()
    registry = toy_registry(datasets={"Far": far})
    datasets = {"train": {"type": "ToyData"}, "val": {"type": "Far"}}
    experiment = toy_experiment(tmp_path, {}, datasets=datasets)
    with pytest.raises(ConfigError, match="Far runs code from"):
        evaluate(experiment, registry, ToyMLP())
    assert far.calls == 0


def test_one_that_cannot_say_what_it_runs_is_refused_all_the_same(tmp_path):
    far = Far(describe=lambda params: params["gone"])
    registry = toy_registry(models={"far_model": far})
    (refused,) = refusals(far_experiment(tmp_path), registry)
    assert "runs code from a place that it does not tell; allow it" in refused.message
    assert far.calls == 0


def test_parameters_are_given_as_the_file_has_them(tmp_path):
    seen = []
    registry = toy_registry(models={"far_model": Far(describe=lambda p: seen.append(dict(p)))})
    refusals(far_experiment(tmp_path), registry)
    assert seen == [{"repo": "a/b"}]
    assert yaml.safe_load((tmp_path / "toy.yaml").read_text())["models"] == MODELS


def test_what_a_stage_inherits_is_listed_once(tmp_path):
    registry = toy_registry(losses={"Far": Far()})
    stages = [{"criterion": {"ce": {"type": "Far"}}, "epochs": 1}, {}]
    assert len(refusals(toy_experiment(tmp_path, *stages), registry)) == 1
