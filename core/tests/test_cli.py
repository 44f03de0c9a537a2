import os
import re
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.distributed.elastic.multiprocessing.api import SignalException

from distill.cli import main

pytestmark = pytest.mark.usefixtures("only_core")

WITHOUT_TORCH = ["cli", "config.load", "reference", "hookspecs", "plugins", "registry", "errors"]


@pytest.fixture
def distill(toys):
    """Run a command with the toy parts."""

    def invoke(command, *arguments):
        given = [command, "-p", str(toys), *map(str, arguments)]
        return CliRunner().invoke(main, given)

    return invoke


@pytest.fixture
def exp(tmp_path, experiment_text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp.yaml").write_text(experiment_text)
    return tmp_path / "exp.yaml"


def is_clean(result):
    return "Traceback" not in result.output and isinstance(result.exception, SystemExit | None)


def without_torch(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_describes_imports_no_torch(module):
    assert without_torch(f"import distill.{module}")


def test_help_and_check_of_the_frame_import_no_torch(exp):
    code = "from distill.cli import main\ntry: main({})\nexcept SystemExit: pass"
    assert without_torch(code.format("['--help']"))
    assert without_torch(code.format("['run', '--help']"))
    assert without_torch(f"from distill import load\nload({str(exp)!r})")


def test_check_of_a_good_file_says_so(distill, exp):
    result = distill("check", exp)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (
        result.stdout
        == f"{exp}: no faults (2 stages, 2 models); data and checkpoints not opened, see --data\n"
    )


@pytest.mark.parametrize("command", ["check", "run", "eval", "inspect"])
@pytest.mark.parametrize("typo", [("log_every", "log_evry"), ("model: thin", "model: thn")])
def test_a_typo_ends_every_command_with_2_and_no_traceback(
    distill, exp, experiment_text, command, typo
):
    exp.write_text(experiment_text.replace(*typo, 1))
    result = distill(command, exp)
    assert result.exit_code == 2
    assert is_clean(result)
    assert result.stdout == ""
    assert result.stderr.startswith(f"{exp}:")
    assert result.stderr.count("\n") == 1
    assert not (exp.parent / "runs").exists()


def test_faults_of_frame_and_components_come_together(distill, exp, experiment_text):
    exp.write_text(experiment_text.replace("log_every", "log_evry").replace("lr: 0.1", "lrr: 0.1"))
    result = distill("check", exp)
    assert result.stderr.splitlines() == [
        f"{exp}:4:1: log_evry: unknown key 'log_evry'; did you mean log_every?",
        f"{exp}:18:37: stages.teach.optimizer.params.lrr: optimizer SGD: there is no parameter "
        "'lrr'; did you mean lr?",
    ]


def test_an_override_is_applied_and_its_fault_named(distill, exp):
    assert distill("check", exp, "-s", "stages.distil.optimizer.params.lr=0.5").exit_code == 0
    result = distill("check", exp, "-s", "stages.teach.epochs=0", "-s", "epochz")
    assert result.exit_code == 2
    assert "-s epochz: '=' is missing; write e.g. stages.kd.epochs=3" in result.stderr
    result = distill("check", exp, "-s", "stages.teach.epochs=0")
    said = "-s stages.teach.epochs=0: stages.teach.epochs: must be at least 1, got the number 0\n"
    assert result.stderr == said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["check", "gone.yaml"], 2, "gone.yaml: there is no such file"),
        (["check", "."], 2, "is a folder, not an experiment file"),
        (["run", "gone.yaml"], 2, "gone.yaml: there is no such file"),
        (["run", "exp.yaml", "--runs", "exp.yaml"], 6, "cannot be used: Not a directory"),
        (["eval", "exp.yaml", "--stage", "distill"], 2, "no stage 'distill' in exp.yaml; did you"),
        (["eval", "exp.yaml", "--dataset", "vall"], 2, "no data set 'vall' in exp.yaml; did you"),
        (["eval", "exp.yaml", "--model", "wid"], 2, "no model 'wid' in exp.yaml; did you mean"),
        (["eval", "exp.yaml", "--seed", "9"], 2, "exp.yaml has no seed 9 (seeds: 3)"),
        (["eval", "."], 2, "resolved.yaml: there is no such file"),
        (["inspect", "exp.yaml", "--model", "wid"], 2, "no model 'wid' in exp.yaml; did you mean"),
        (["inspect", "ToyMLP"], 2, "give the shape of one input, e.g. --input 3,224,224"),
        (["inspect", "ToyMLP", "--input", "4x4"], 2, "--input 4x4: write numbers with commas"),
        (["inspect", "ToyMPL", "--input", "4"], 3, "there is no model 'ToyMPL'; did you mean"),
        (["inspect", "ToyMLP", "--input", "4", "--param", "hiden=3"], 2, "did you mean hidden?"),
        (["inspect", "ToyMLP", "--input", "5"], 2, "ToyMLP cannot take inputs (2, 5): "),
        (["inspect", "exp.yaml", "--input", "3,3,3"], 2, "cannot take inputs (2, 3, 3, 3)"),
        (["check", "exp.yaml", "-p", "gone.py"], 3, "-p gone.py: there is no such file"),
    ],
)
def test_what_is_not_there_is_an_error_in_words(distill, exp, arguments, code, said):
    result = distill(*arguments)
    assert is_clean(result), result.exception
    assert said in result.stderr
    assert result.exit_code == code


@pytest.mark.parametrize(
    "arguments",
    [["chekc"], ["run"], ["check", "--dat", "exp.yaml"], ["run", "x", "--processes", "0"]],
)
def test_wrong_usage_ends_with_2(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert is_clean(result)


def test_check_with_data_opens_data_and_runs_two_samples(distill, exp, experiment_text):
    good = distill("check", exp, "--data")
    assert good.exit_code == 0
    assert "(2 stages, 2 models); two samples have gone through every stage\n" in good.stdout
    exp.write_text(experiment_text.replace("size: 24", "size: 24, classes: 5"))
    assert distill("check", exp).exit_code == 0
    result = distill("check", exp, "--data")
    assert result.exit_code == 5
    assert "model 'wide' has 3 outputs, but data set 'train' has 5 classes" in result.stderr
    exp.write_text(experiment_text.replace("size: 24", "size: 0"))
    result = distill("check", exp, "--data")
    assert (result.exit_code, is_clean(result)) == (5, True)
    assert f"{exp}:6:3: datasets.train: the data set is empty" in result.stderr


def test_run_eval_and_inspect_of_a_small_experiment(distill, exp):
    observers = "observers=[Console, ResultFiles]"
    result = distill("run", exp, "--profile", "-s", "stages.teach.epochs=1", "-s", observers)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("| part of a step ") == 2
    assert "| teach  | wide" in result.stdout
    assert (exp.parent / "runs/toy/report.md").exists()
    measured = distill("eval", "runs/toy")
    assert measured.exit_code == 0, measured.output
    assert measured.stdout.startswith(
        "model thin, last of stage distil, seed 3, on data set val:\n"
    )
    table = measured.stdout.split("accuracy ")[1].strip()
    assert f"test: accuracy {table}" in result.stdout
    before = distill("eval", "runs/toy", "--stage", "distil", "--model", "teacher")
    assert before.stdout.startswith(
        "model wide, last of stage teach (stage distil does not train it), seed 3, on data set val:"
    )
    own = distill("eval", "runs/toy", "--stage", "teach")
    assert own.stdout.startswith("model wide, last of stage teach, seed 3, on data set val:\n")
    changed = distill("run", exp)
    assert changed.exit_code == 2
    assert "stages.teach.epochs: 1 -> 2" in changed.stderr
    command = f"`distill run {exp} -s stages.teach.epochs=1 -s 'observers=[Console, ResultFiles]'`"
    assert f"to go on with it, write {command}" in changed.stderr
    shown = distill("inspect", exp, "--model", "wide")
    assert "wide: (2, 4) -> (2, 3)" in shown.stdout


UNTRAINED = {
    "file": (["exp.yaml"], "thin", "not trained here"),
    "teacher": (["runs/toy", "--model", "teacher"], "fat", "not trained in this run"),
    "model": (["runs/toy", "--model", "fat", "--stage", "teach"], "fat", "not trained in this run"),
    "later": (
        ["runs/toy", "--model", "thin", "--stage", "teach"],
        "thin",
        "not trained up to stage teach",
    ),
}


@pytest.mark.parametrize("asked", UNTRAINED)
def test_of_what_was_not_trained_other_weights_are_refused_and_its_own_are_called_so(
    distill, exp, experiment_text, asked
):
    text = experiment_text.replace(
        "  thin:", "  fat: {type: ToyMLP, params: {hidden: 16}}\n  thin:"
    )
    exp.write_text(text.replace("teacher: {model: wide", "teacher: {model: fat"))
    assert distill("run", exp).exit_code == 0
    command, model, why = UNTRAINED[asked]
    refused = distill("eval", *command, "--weights", "best")
    hint = "; give a run's folder" if asked == "file" else ""
    said = f"error: model {model} has no 'best' weights: it is {why}{hint}\n"
    assert (refused.exit_code, refused.output) == (2, said)
    own = distill("eval", *command)
    assert own.stdout.startswith(f"model {model} (as the file builds it, {why}), on data set val:")


def test_of_what_an_earlier_stage_trained_its_weights_can_be_chosen(distill, exp):
    assert distill("run", exp).exit_code == 0
    given = ("eval", "runs/toy", "--model", "teacher", "--stage", "distil", "--weights", "best")
    said = "model wide, best of stage teach (stage distil does not train it), seed 3, on data set"
    assert distill(*given).stdout.startswith(said)


def test_an_average_that_no_stage_keeps_cannot_be_measured(distill, exp):
    assert distill("run", exp).exit_code == 0
    refused = distill("eval", "runs/toy", "--weights", "ema")
    said = "error: stage distil keeps no average ('ema')\n"
    assert (refused.exit_code, refused.output) == (2, said)


@pytest.mark.parametrize("command", [("run", "exp.yaml"), ("eval", "runs/toy")])
def test_a_run_is_gone_on_with_or_measured_only_with_the_file_it_was_made_with(
    distill, exp, experiment_text, toys, command
):
    exp.write_text(experiment_text.replace("  - type: Console", "  - ResultFiles"))
    assert distill("run", exp).exit_code == 0
    without = CliRunner().invoke(main, command)
    assert (without.exit_code, is_clean(without)) == (2, True)
    assert f"; the run was made with -p {toys}: give it again\n" in without.stderr
    assert "did you mean" not in without.stderr
    again = CliRunner().invoke(main, [*command, "-p", os.path.relpath(toys)])
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("command", [("check", "exp.yaml"), ("run", "exp.yaml")])
def test_of_a_file_that_no_run_was_made_with_it_is_said_how_it_is_given(exp, command):
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, is_clean(result)) == (2, True)
    said = "there is no data set 'ToyData'; if a file of yours offers it, give that with -p\n"
    assert said in result.stderr


def test_a_profile_of_a_finished_run_is_answered_with_how_to_begin_anew(distill, exp):
    given = ("run", exp, "-s", "stages.teach.epochs=1")
    assert "nothing to profile" not in distill(*given, "--profile").stdout
    assert "nothing to profile" not in distill(*given).stdout
    again = distill(*given, "--profile")
    assert again.exit_code == 0
    (note,) = [line for line in again.stdout.splitlines() if "nothing to profile" in line]
    assert "this run is finished; -s name=NEW starts it anew" in note
    assert "| part of a step " in distill(*given, "--profile", "-s", "name=NEW").stdout


FOUND_LATE = {
    "no data": ("size: 24", "size: 0", 5, "the data set is empty"),
    "classes": ("size: 24", "size: 24, classes: 5", 5, "'train' has 5 classes"),
    "shapes": ("out_features: 16", "out_features: 15", 2, "MSELoss failed on"),
    "checkpoint": ("{hidden: 4}", "{hidden: 4}, checkpoint: gone.safetensors", 2, "gone"),
    "top": (
        "teacher: {model: wide, mode",
        "teacher: {model: wide, store: {encoding: top_k, top: 3}, mode",
        5,
        "stages.distil.teacher.store: 'teacher' has the shape (2, 3); encoding top_k is for logits",
    ),
    "top_k": (
        "metrics: [accuracy]",
        "metrics: [{type: accuracy, params: {top_k: 4}}]",
        2,
        "'accuracy(top_k=4)' cannot be measured on data set 'val': counts the first 4 of 3 classes",
    ),
    "device": ("device: cpu", "device: cuda:99", 2, "cuda:99"),
}


@pytest.mark.parametrize("fault", FOUND_LATE)
def test_a_fault_found_in_data_reads_as_in_a_check_and_leaves_no_folder(
    distill, exp, experiment_text, fault
):
    piece, other, code, said = FOUND_LATE[fault]
    assert piece in experiment_text
    exp.write_text(experiment_text.replace(piece, other, 1))
    checked, ran = distill("check", exp, "--data"), distill("run", exp)
    assert (ran.exit_code, ran.output) == (checked.exit_code, checked.output)
    assert ran.exit_code == code
    assert said in ran.output
    assert is_clean(ran)
    assert {file.name for file in exp.parent.iterdir()} == {"exp.yaml"}


def test_processes_are_not_handed_on():
    from distill.launcher import without_processes

    given = ["run", "exp.yaml", "--processes", "2", "-s", "a=1", "--processes=3"]
    assert without_processes(given) == ["run", "exp.yaml", "-s", "a=1"]


def test_an_interruption_says_how_to_go_on(distill, exp, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.runner.run", interrupt)
    result = distill("run", exp)
    assert result.exit_code == 75
    assert "the same command goes on from the end of the last epoch" in result.stderr


def python(code, *arguments, **variables):
    """Run code in a process of its own; return the signal or code that ended it, and its words."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return -done.returncode, done.stderr


ENDED = """
import os, signal, sys
import distill.experiment_file
from distill.cli import main
end = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
distill.experiment_file.open_experiment = end
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run"], "goes on from the end of the last epoch, if one has ended"),
        (["store", "build"], "what is stored stays, and the same command goes on"),
    ],
    ids=["run", "store build"],
)
def test_a_request_to_end_is_one_line_that_says_how_to_go_on(exp, command, said):
    ended, told = python(ENDED, *command, exp)
    assert ended == signal.SIGTERM
    (line,) = told.strip().splitlines()
    assert line.startswith("ended by SIGTERM; ")
    assert said in line


ENDED_IN = """
import os, signal, sys
from distill.cli_errors import told_if_ended
with told_if_ended("it goes on"):
    if "forked" in sys.argv and os.fork():
        sys.exit(-os.WTERMSIG(os.wait()[1]))
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_what_works_for_a_process_or_beside_it_ends_without_a_word():
    assert python(ENDED_IN) == (signal.SIGTERM, "\nended by SIGTERM; it goes on\n")
    assert python(ENDED_IN, RANK="0") == (signal.SIGTERM, "")
    code, told = python(ENDED_IN, "forked")
    assert (-code, told) == (256 - signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("asked", "heard"), [(signal.SIGINT, []), (signal.SIGTERM, [signal.SIGTERM])]
)
def test_who_starts_several_processes_ends_by_a_request_as_one_does(monkeypatch, asked, heard):
    from distill import launcher

    def interrupted(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torch, too, puts its own in its place
        raise SignalException("", asked)

    monkeypatch.setattr(launcher, "elastic_launch", lambda *_: interrupted)
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        assert launcher.launch(2, ["run"]) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == heard


def test_other_ranks_say_nothing(distill, exp, experiment_text, monkeypatch):
    exp.write_text(experiment_text.replace("lr: 0.1", "lrr: 0.1"))
    monkeypatch.setenv("RANK", "1")
    result = distill("check", exp)
    assert (result.exit_code, result.output) == (2, "")


def ways_to_end(distill, exp, text, monkeypatch):
    """Each way in which a command ends, by its exit code."""
    yield 0, distill("check", exp)
    yield 2, distill("check", exp, "-s", "stages.teach.epochs=0")
    yield 2, distill("chekc")
    yield 3, distill("check", exp, "-p", "gone.py")
    yield 4, distill("run", exp, "-s", "stages.teach.optimizer.params.lr=1e38")
    yield 5, distill("check", exp, "--data", "-s", "datasets.train.params.size=0")
    yield 6, distill("run", exp, "--runs", exp)
    yield 143, in_shell(ENDED, "run", exp)
    for code, error in (
        (70, ZeroDivisionError),
        (70, torch.OutOfMemoryError),
        (75, KeyboardInterrupt),
    ):
        monkeypatch.setattr("distill.runner.run", lambda *_, error=error, **__: throw(error))
        yield code, distill("run", exp)


def in_shell(code, *arguments):
    """Run code in a process of its own; return what a shell makes of its end."""
    words = shlex.join([sys.executable, "-c", code, *map(str, arguments)])
    done = subprocess.run(["sh", "-c", f"{words}; exit $?"], capture_output=True, timeout=120)
    return SimpleNamespace(exit_code=done.returncode)


def throw(error):
    raise error


def test_the_exit_codes_of_help_are_those_that_commands_end_with(
    distill, exp, experiment_text, monkeypatch
):
    ends = [(code, end) for code, end in ways_to_end(distill, exp, experiment_text, monkeypatch)]
    assert [code for code, _ in ends] == [end.exit_code for _, end in ends]
    for asked in (["--help"], ["run", "--help"]):
        text = CliRunner().invoke(main, asked).stdout
        said = " ".join(text.split("Exit codes:")[1].split())
        listed = [int(number) for number in re.findall(r"(\d+) ", said)]
        assert listed == sorted({code for code, _ in ends})
