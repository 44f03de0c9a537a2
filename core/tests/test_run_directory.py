import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from distill import ConfigError, StorageError, load
from distill.run_directory import (
    GIVEN,
    OVERRIDES,
    RESOLVED,
    forgotten_files,
    open_run,
    seed_directory,
)


@pytest.fixture
def experiment(tmp_path, experiment_text):
    """Load an experiment with overrides."""
    file = tmp_path / "exp.yaml"
    file.write_text(experiment_text)
    return lambda *overrides: load(file, overrides)


def test_a_run_holds_the_file_as_given_and_as_resolved(tmp_path, experiment, experiment_text):
    with open_run(tmp_path / "runs", experiment("stages.teach.epochs=9")) as directory:
        assert directory == tmp_path / "runs" / "toy"
        assert (directory / GIVEN).read_text() == experiment_text
    resolved = load(directory / RESOLVED)
    assert [stage.epochs for stage in resolved.stages] == [9, 9]


def test_the_same_file_may_go_on(tmp_path, experiment):
    for _ in range(2):
        with open_run(tmp_path, experiment()):
            pass


def test_what_is_said_otherwise_but_means_the_same_may_go_on(tmp_path, experiment, experiment_text):
    with open_run(tmp_path, experiment()):
        pass
    (tmp_path / "exp.yaml").write_text("# a comment\n" + experiment_text)
    with open_run(tmp_path, experiment("stages.distil.epochs=2")):
        pass


def test_a_key_that_an_earlier_version_did_not_know_and_nobody_sets_is_no_change(
    tmp_path, experiment
):
    with open_run(tmp_path, experiment()) as directory:
        resolved = yaml.safe_load((directory / RESOLVED).read_text())
    unset = [key for key, value in resolved["stages"][0].items() if value is None]
    assert unset
    for key in unset:
        del resolved["stages"][0][key]
    (directory / RESOLVED).write_text(yaml.safe_dump(resolved))
    with open_run(tmp_path, experiment()):
        pass


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("log_every=6", "log_every: 5 -> 6"),
        ("seed=4", "seeds[0]: 3 -> 4"),
        (
            "stages.teach.optimizer.params.lr=0.2",
            "stages.teach.optimizer.params.lr: 0.1 -> 0.2",
        ),
        (
            "stages.distil.criterion.kd.weight=1",
            "stages.distil.criterion.kd.weight: 0.5 -> 1",
        ),
        (
            "stages.teach.optimizer.params.momentum=0.9",
            "stages.teach.optimizer.params.momentum: not given -> 0.9",
        ),
        ("models.thin.params.hidden=5", "models.thin.params.hidden: 4 -> 5"),
        ("datasets.train.transforms=[]", 'datasets.train.transforms: [{"type": "Scale",'),
        ("stages.distil.name=kd", "stages.kd.name: distil -> kd"),
    ],
)
def test_another_version_of_the_file_is_refused_naming_the_keys(
    tmp_path, experiment, override, named
):
    directory = start(tmp_path, experiment())
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(ConfigError) as caught, open_run(tmp_path, experiment(override)):
        pass
    assert f"\n  {named}" in str(caught.value)
    assert "give this one another name (-s name=NEW), or move that run away" in str(caught.value)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_the_fault_of_a_changed_file_stands_at_its_name(tmp_path, experiment):
    start(tmp_path, experiment())
    with pytest.raises(ConfigError) as caught, open_run(tmp_path, experiment("log_every=6")):
        pass
    (fault,) = caught.value.faults
    assert (fault.path, fault.location.line) == ("name", 1)


def test_every_key_that_differs_is_named(tmp_path, experiment):
    start(tmp_path, experiment())
    changed = experiment("log_every=6", "stages.teach.epochs=7")
    with pytest.raises(ConfigError) as caught, open_run(tmp_path, changed):
        pass
    listed = str(caught.value).splitlines()[1:]
    assert listed == [
        "  log_every: 5 -> 6",
        "  stages.teach.epochs: 2 -> 7",
        "  stages.distil.epochs: 2 -> 7",
    ]


def said_of_another(tmp_path, experiment):
    with pytest.raises(ConfigError) as caught, open_run(tmp_path, experiment):
        pass
    return str(caught.value).splitlines()[0]


def test_values_given_by_s_that_are_forgotten_are_named_with_the_command(tmp_path, experiment):
    start(tmp_path, experiment("log_every=6", "observers=[{type: Console}]"))
    file = tmp_path / "exp.yaml"
    said = said_of_another(tmp_path, experiment("observers=[{type: Console}]"))
    command = f"distill run {file} -s log_every=6 -s 'observers=[{{type: Console}}]'"
    assert (
        f"holds a run of this file with other values from -s; to go on with it, write `{command}`"
        in said
    )
    assert "another version" not in said


def test_values_given_by_s_for_the_first_time_are_told_from_a_changed_file(tmp_path, experiment):
    start(tmp_path, experiment())
    said = said_of_another(tmp_path, experiment("log_every=6"))
    assert (
        f"with other values from -s; to go on with it, write `distill run {tmp_path}/exp.yaml` ("
        in said
    )


def test_a_changed_file_is_named_beside_forgotten_values(tmp_path, experiment, experiment_text):
    start(tmp_path, experiment("log_every=6"))
    (tmp_path / "exp.yaml").write_text(experiment_text.replace("seed: 3", "seed: 4"))
    said = said_of_another(tmp_path, experiment())
    command = f"distill run {tmp_path}/exp.yaml -s log_every=6"
    assert f"holds a run of another version of this file, begun with `{command}`; give" in said
    said = said_of_another(tmp_path, experiment("log_every=6"))
    assert "holds a run of another version of this file; give" in said


def test_of_a_run_that_kept_no_values_of_s_nothing_is_said_of_them(tmp_path, experiment):
    directory = start(tmp_path, experiment("log_every=6"))
    (directory / OVERRIDES).unlink()
    assert "holds a run of another version of this file; give" in said_of_another(
        tmp_path, experiment()
    )
    with open_run(tmp_path, experiment("log_every=6")):
        pass


def test_a_second_process_is_refused_and_let_in_when_the_first_is_gone(tmp_path, experiment):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from distill import load
        from distill.run_directory import open_run
        with open_run(Path(sys.argv[1]), load(sys.argv[2])):
            print("open", flush=True)
            sys.stdin.read()
        """
    )
    experiment()
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "exp.yaml")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "open\n"
        with pytest.raises(StorageError, match="another process is running in"):
            open_run(tmp_path, experiment()).__enter__()
    finally:
        first.kill()
        first.wait()
    with open_run(tmp_path, experiment()):
        pass


def test_the_folder_is_free_after_an_error(tmp_path, experiment):
    with pytest.raises(RuntimeError), open_run(tmp_path, experiment()):
        raise RuntimeError
    with open_run(tmp_path, experiment()):
        pass


def test_a_failed_write_leaves_nothing_half_written(tmp_path, experiment, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="No space left"), open_run(tmp_path, experiment()):
        pass
    assert not (tmp_path / "toy").exists()


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path, experiment):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/toy cannot be used: Not a directory"):
        open_run(tmp_path / "file", experiment()).__enter__()


def test_a_damaged_resolved_file_is_an_error_in_words(tmp_path, experiment):
    directory = start(tmp_path, experiment())
    (directory / RESOLVED).write_text("name: [")
    with pytest.raises(StorageError, match=r"resolved\.yaml is damaged"):
        open_run(tmp_path, experiment()).__enter__()


def test_several_seeds_have_folders_of_their_own(tmp_path, experiment, experiment_text):
    assert seed_directory(tmp_path, experiment(), 3) == tmp_path
    (tmp_path / "exp.yaml").write_text(experiment_text.replace("seed: 3", "seeds: [3, 4]"))
    assert seed_directory(tmp_path, experiment(), 4) == tmp_path / "seed-4"


def session(*files):
    """A session's plugins as ResultFiles records them."""
    plugins = [{"name": "kd", "distribution": "distill-kd", "version": "0.1.0", "error": None}]
    plugins += [{"name": f, "distribution": f, "version": "", "error": None} for f in files]
    return {"plugins": plugins}


def test_plugin_files_of_a_runs_last_session_that_are_not_given_are_forgotten(tmp_path):
    sessions = [session("old.py"), session("parts/a.py", "b.py")]
    (tmp_path / "environment.json").write_text(json.dumps(sessions))
    assert forgotten_files(tmp_path, []) == ["parts/a.py", "b.py"]
    assert forgotten_files(tmp_path, [Path("../a.py")]) == ["b.py"]
    assert forgotten_files(tmp_path, [Path("b.py"), Path("a.py")]) == []


@pytest.mark.parametrize("record", [None, "", "[", "[]", "{}", "3", '[{"plugins": [1]}]', "[{}]"])
def test_of_a_run_without_a_record_of_plugins_nothing_is_forgotten(tmp_path, record):
    if record is not None:
        (tmp_path / "environment.json").write_text(record)
    assert forgotten_files(tmp_path, []) == []


def start(folder, experiment):
    """Open a run and leave a checkpoint, as after its first epoch."""
    with open_run(folder, experiment) as directory:
        (directory / "checkpoint.pt").touch()
    return directory


def test_an_attempt_that_failed_before_its_first_checkpoint_does_not_block_its_name(
    tmp_path, experiment
):
    with open_run(tmp_path, experiment()):
        pass
    with open_run(tmp_path, experiment("log_every=6")) as directory:
        assert "log_every: 6" in (directory / RESOLVED).read_text()


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path, experiment):
    with pytest.raises(RuntimeError), open_run(tmp_path / "new" / "runs", experiment()):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_there_before_a_run_stays(tmp_path, experiment, error):
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    with pytest.raises(error), open_run(tmp_path / "runs", experiment()):
        raise error
    assert (tmp_path / "runs" / "toy").exists()
    (tmp_path / "other").mkdir()
    with pytest.raises(error), open_run(tmp_path / "other", experiment()):
        raise error
    assert not any((tmp_path / "other").iterdir())


def test_a_run_that_has_left_something_keeps_its_folder(tmp_path, experiment):
    left = tmp_path / "toy" / "metrics.jsonl"
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, experiment()):
        left.write_text(str(left.write_text("{}") / 0))
    assert {file.name for file in left.parent.iterdir()} >= {GIVEN, RESOLVED, left.name}
