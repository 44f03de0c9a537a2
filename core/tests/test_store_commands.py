"""The commands on stores: what they say, what they end with, and what they leave alone."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from distill import store_building
from distill.cli import main
from distill.config.load import load
from distill.errors import StorageError
from distill.store.folder import remove, verify
from distill.store.measured import MEASURED, note_measured
from distill.store.rows import META, Rows, create, open_rows
from distill.store.use import is_held, kept_to_itself
from distill.store_building import build_stores
from distill.testing import ToyMLP, toy_experiment, toy_registry

ROWS = 4
IDENTITY = {
    "teacher": {"model": {"component": ["ToyMLP", {}]}},
    "asked": ['["teacher"]'],
    "kept": {"encoding": "float16", "top": 12},
    "data": {"component": ["ToyData", {}]},
    "views": None,
}


def described(folder):
    """A stage whose teacher stores two views of 20 samples."""
    folder.mkdir(parents=True)
    file = folder / "teacher.safetensors"
    save_file(ToyMLP(12).state_dict(), file)
    wide = {"type": "ToyMLP", "params": {"hidden": 12}, "checkpoint": str(file)}
    stage = {
        "epochs": 2,
        "data": {"train": "train", "validate": "val", "batch_size": 8, "views": 2},
        "criterion": {
            "match": {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
        },
        "teacher": {"model": "wide", "store": True},
    }
    data = {
        "train": {"type": "ToyData", "params": {"size": 20}},
        "val": {"type": "ToyData", "params": {"size": 12, "seed": 1}},
    }
    models = {"mlp": {"type": "ToyMLP", "params": {"hidden": 12}}, "wide": wide}
    return toy_experiment(folder, stage, models=models, datasets=data, observers=[])


def built(tmp_path):
    """Return what is said while the store is built."""
    said = []
    folder = tmp_path / "first"
    experiment = load(folder / "toy.yaml") if folder.exists() else described(folder)
    build_stores(experiment, toy_registry(), tmp_path / "stores", said.append)
    return said


def command(*arguments, answer=None):
    result = CliRunner().invoke(main, ["store", *arguments], input=answer)
    return result.exit_code, result.output


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Three stores in ``stores`` of the working directory, two of which begin alike."""
    monkeypatch.chdir(tmp_path)
    about = {"teacher": "wide", "data": "train"}
    for name in ("abcdefgh01", "abcdefgh02", "b"):
        create(Path("stores") / name, {"identity": IDENTITY, "about": about}, ROWS, 2)
    return tmp_path / "stores"


def names(stores):
    return sorted(path.name for path in stores.iterdir())


def test_a_store_is_removed_by_the_beginning_of_its_name(stores):
    code, said = command("remove", "abcdefgh02", "b", "--yes")
    assert (code, names(stores)) == (0, ["abcdefgh01"])
    assert [line.partition(" (")[0] for line in said.splitlines()] == [
        "removed stores/abcdefgh02",
        "removed stores/b",
    ]


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [("y\n", 0, 2), ("n\n", 0, 3), ("", 2, 3)],
    ids=["yes", "no", "nobody"],
)
def test_what_goes_is_shown_before_it_is_asked_for(stores, answer, code, left):
    ended, said = command("remove", "b", answer=answer)
    assert (ended, len(names(stores))) == (code, left)
    row = next(line for line in said.splitlines() if line.startswith("b "))
    assert "wide (ToyMLP)" in row
    assert f" {ROWS} " in row
    assert "kB" in row
    assert "remove this store from stores (" in said
    assert ("nothing is removed\n" in said) == answer.startswith("n")
    assert ("nobody answered, so nothing is removed; --yes asks nothing" in said) == (code == 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x", "there is no store 'x' in stores (there are: "),
        ("abc", "2 stores begin with 'abc' in stores (there are: "),
        ("photos", "there is no store 'photos'"),
    ],
)
def test_an_unknown_or_ambiguous_name_removes_nothing_and_says_what_is_there(stores, given, said):
    (stores / "photos").mkdir()
    (stores / "photos" / "cat.jpg").write_bytes(b"")
    for verb in ("remove", "verify"):
        code, told = command(verb, "b", given)
        assert (code, said in told) == (2, True)
        assert "abcdefgh01" in told
    assert len(names(stores)) == 4


def test_a_path_names_a_store_too(stores):
    assert command("remove", "stores/b/", "--yes")[0] == 0
    assert "b" not in names(stores)


def test_what_somebody_has_open_is_neither_removed_nor_garbage(stores):
    filling = open_rows(stores / "b")
    code, said = command("remove", "abcdefgh01", "b", "--yes")
    assert (code, len(names(stores))) == (6, 3)
    assert "stores/b is in use by a run or a build" in said
    assert "stores/b is in use, and stays" in command("gc", "--unused", "0", "--yes")[1]
    assert names(stores) == ["b"]
    filling.release()
    assert command("remove", "b", "--yes")[0] == 0


def test_listing_and_verifying_is_no_use_that_keeps_others_from_removing(stores):
    looked_at = open_rows(stores / "b", touch=False)
    command("ls")
    command("verify")
    assert command("remove", "b", "--yes")[0] == 0
    assert looked_at.filled == 0


def test_a_removal_that_was_killed_is_in_nobodys_way(stores):
    shutil.copytree(stores / "b", stores / ".b.removed")
    assert remove(stores / "b") > 0
    assert names(stores) == ["abcdefgh01", "abcdefgh02"]


@pytest.mark.parametrize(("days", "said"), [("30", "30 days"), ("1", "1 day"), ("2.5", "2.5 days")])
def test_where_nothing_is_to_be_removed_it_is_said_what_was_looked_for(stores, days, said):
    looked_for = f"none damaged, half made or unused for {said}"
    for more in ([], ["--dry-run"]):
        told = command("gc", "--unused", days, *more)
        assert told == (0, f"nothing to remove in stores ({looked_for})\n")
    assert len(names(stores)) == 3


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [("y\n", 0, 0), ("n\n", 0, 3), ("", 2, 3)],
    ids=["yes", "no", "nobody"],
)
def test_stores_of_today_are_collected_after_a_question_only(stores, answer, code, left):
    ended, said = command("gc", "--unused", "0", answer=answer)
    assert (ended, len(names(stores))) == (code, left)
    rows = [line for line in said.splitlines() if "wide (ToyMLP)" in line]
    assert len(rows) == 3
    assert "remove these stores from stores (0.2 kB)?" in said
    assert ("nothing is removed\n" in said) == answer.startswith("n")


def test_what_somebody_opens_while_the_question_stands_stays(stores, monkeypatch):
    opened = []

    def answered(question):
        opened.append(open_rows(stores / "b"))
        return True

    monkeypatch.setattr("click.confirm", answered)
    code, said = command("gc", "--unused", "0")
    assert (code, names(stores)) == (0, ["b"])
    assert "stores/b is in use, and stays" in said
    opened[0].release()


def test_nothing_is_asked_of_what_is_old_damaged_or_would_only_be_named(stores):
    would = command("gc", "--unused", "0", "--dry-run")[1]
    assert sorted(line.partition(" (")[0] for line in would.splitlines()) == [
        "0.2 kB to be freed",
        *(f"would remove stores/{name}" for name in ("abcdefgh01", "abcdefgh02", "b")),
    ]
    unused_for(stores / "abcdefgh01", days=40)
    cut(stores / "b")
    code, said = command("gc")
    assert (code, names(stores)) == (0, ["abcdefgh02"])
    assert "?" not in said
    unused_for(stores / "abcdefgh02", days=2)
    assert command("gc", "--unused", "1.5")[0] == 0
    assert names(stores) == []


def unused_for(store, days):
    then = (store / META).stat().st_mtime - days * 86_400
    os.utime(store / META, (then, then))


COMMANDS = {"ls": [], "verify": [], "gc": [], "remove": ["x"]}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_folder_that_is_not_there_is_an_error(tmp_path, verb):
    nowhere = str(tmp_path / "nowhere")
    code, said = command(verb, *COMMANDS[verb], "--stores", nowhere)
    assert code == 6
    assert f"there is no folder {nowhere}; --stores DIR names" in said


def test_nobody_has_to_have_stores_but_a_folder_that_is_named_is_to_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = "no stores in stores/; a stage with teacher: {model: ..., store: true} makes one\n"
    assert command("ls") == (0, said)
    assert not (tmp_path / "stores").exists()
    assert command("ls", "--stores", "stores")[0] == 6


@pytest.mark.parametrize("verb", ["ls", "verify"])
def test_an_empty_folder_is_fine(tmp_path, verb):
    assert command(verb, "--stores", str(tmp_path)) == (0, f"no stores in {tmp_path}\n")


def cut(store):
    (store / META).write_text((store / META).read_text()[:40])


def older(store):
    meta = json.loads((store / META).read_text())
    del meta["sha256"]
    (store / META).write_text(json.dumps({**meta, "format": 0}))


def other_json(store):
    (store / META).write_text("[1]")


def without_description(store):
    (store / META).unlink()


def folder_for_rows(store):
    (store / "rows.bin").unlink()
    (store / "rows.bin").mkdir()


DAMAGES = {
    cut: ("damaged", "its meta.json cannot be read", "gc"),
    older: ("of another version", "whose stores have layout 0 where this one's have 1", "remove b"),
    other_json: ("damaged", "its meta.json cannot be read", "gc"),
    without_description: ("damaged", "it has no meta.json", "gc"),
    folder_for_rows: ("damaged", "cannot be opened: Is a directory", "gc"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_store_that_cannot_be_used_is_one_clear_line(stores, damage):
    damage(stores / "b")
    state, why, way_out = DAMAGES[damage]
    code, said = command("ls")
    (line,) = [line for line in said.splitlines() if line.startswith("b ")]
    assert (code, state in line) == (0, True)
    code, said = command("verify")
    (line,) = [line for line in said.splitlines() if "stores/b" in line]
    assert code == 5
    assert why in line
    assert f"`distill store {way_out}` removes it" in line
    assert command("remove", "b", "--yes")[0] == 0
    assert "b" not in names(stores)


def test_a_store_of_another_version_that_is_in_use_there_is_no_garbage(stores):
    older(stores / "b")
    cut(stores / "abcdefgh01")
    command("gc")
    assert names(stores) == ["abcdefgh02", "b"]


def test_other_folders_are_named_and_left_alone(stores):
    (stores / "photos").mkdir()
    (stores / "photos" / "cat.jpg").write_bytes(b"")
    for verb in ("ls", "verify"):
        code, said = command(verb)
        assert (code, said.splitlines()[-1]) == (0, "no store: photos")
    command("gc", "--unused", "0", "--yes")
    assert names(stores) == ["photos"]
    assert command("ls") == (0, "no stores in stores\nno store: photos\n")


def test_what_others_describe_in_a_file_of_the_same_name_is_no_store(stores):
    (stores / "coco" / "images").mkdir(parents=True)
    (stores / "coco" / META).write_text('{"format": "coco"}')
    assert command("ls")[1].splitlines()[-1] == "no store: coco"
    assert command("remove", "coco", "--yes")[0] != 0
    with pytest.raises(StorageError, match="holds more than a store, or none"):
        remove(stores / "coco")
    assert (stores / "coco" / "images").is_dir()


def test_whoever_looks_for_a_moment_keeps_nobody_from_using_a_store(stores):
    with ThreadPoolExecutor() as threads:
        with kept_to_itself(stores / "b" / META) as is_free:
            assert is_free
            opening = threads.submit(open_rows, stores / "b")
            sleep(0.05)
            assert not opening.done()
        rows = opening.result()
    assert is_held(stores / "b" / META)
    rows.release()
    assert not is_held(stores / "b" / META)


def test_a_forked_process_does_not_use_what_its_parent_has_let_go(stores):
    rows = open_rows(stores / "b")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(0)
    rows.release()
    try:
        assert not is_held(stores / "b" / META)
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)


def test_a_store_that_does_not_say_what_it_is_for_is_listed_all_the_same(stores):
    create(stores / "c", {"identity": {"views": 2}}, ROWS, 2)
    code, said = command("ls")
    (line,) = [line for line in said.splitlines() if line.startswith("c ")]
    assert (code, line.split()[1:4]) == (0, ["of", "another", "version"])


def test_damage_in_a_store_that_may_only_be_read_is_counted_and_stays(stores, monkeypatch):
    rows = open_rows(stores / "b")
    rows.write(
        numpy.arange(2), numpy.ones((2, 2), numpy.uint8), numpy.arange(2, dtype=numpy.uint64)
    )
    rows.rows[1, 0] ^= 1
    monkeypatch.setattr("distill.store.rows.os.access", lambda *_: False)
    assert verify(stores / "b") == (2, 1)
    assert verify(stores / "b") == (2, 1)


def test_a_measurement_that_is_not_what_was_written_is_damage_too(stores):
    note_measured(stores / "b", "key", {"accuracy": 0.4375})
    assert command("verify", "b") == (0, "b: 0 rows, all sound\n")
    file = stores / "b" / MEASURED
    file.write_text(file.read_text().replace("0.4375", "0.9375"))
    why = "measured.json is damaged, and the teacher is to be measured anew"
    assert command("verify", "b") == (5, f"b: 0 rows, all sound; {why}\n")
    assert command("verify", "b") == (0, "b: 0 rows, all sound\n")


def test_a_build_says_first_what_it_makes_and_last_what_is_there(tmp_path):
    said = built(tmp_path)
    (folder,) = (tmp_path / "stores").iterdir()
    nbytes = sum((folder / name).stat().st_size for name in ("rows.bin", "checks.bin"))
    assert said[:2] == [
        "stage stage0: teacher: 20 samples of train x 2 views = 40 rows, "
        f"{nbytes / 1000:.1f} kB, in {folder}",
        "  no row is there yet",
    ]
    assert re.fullmatch(r"  measuring on val .*", said[2])
    assert re.fullmatch(r"  teacher: accuracy 0\.\d{4}", said[3])
    assert said[-1] == "  teacher: 40 of 40 rows are there"


def test_a_store_has_the_size_in_a_list_that_it_had_when_it_was_built(tmp_path):
    size = re.search(r" = 40 rows, (\S+ kB), in ", built(tmp_path)[0])[1]
    (folder,) = (tmp_path / "stores").iterdir()
    at = ("--stores", str(tmp_path / "stores"))
    assert size in command("ls", *at)[1]
    assert f"({size})" in command("gc", "--unused", "0", "--dry-run", *at)[1]
    assert f"removed {folder} ({size})" in command("remove", folder.name, "--yes", *at)[1]


def test_a_build_that_was_stopped_says_how_much_was_there(tmp_path, monkeypatch):
    write, left = Rows.write, [2]

    def stopped(*arguments):
        write(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Rows, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path)
    monkeypatch.setattr(Rows, "write", write)
    assert built(tmp_path)[1] == "  16 rows (40%) are there already, 24 to go"
    there = "  all rows are there already; they are compared with the samples"
    assert built(tmp_path)[1] == there


def test_a_build_lets_go_of_its_stores(tmp_path, monkeypatch):
    opened = []

    def remembered(folder):
        opened.append(open_rows(folder))
        return opened[-1]

    monkeypatch.setattr("distill.store.rows.open_rows", remembered)
    built(tmp_path)
    assert opened
    (folder,) = (tmp_path / "stores").iterdir()
    assert remove(folder) > 0


def test_progress_is_told_at_intervals_with_the_speed_of_the_last_one(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(store_building, "monotonic", lambda: clock[0])
    told = store_building._Progress(said.append, 8000)
    for time in (1, 2, 3, 11, 12, 21, 22):
        clock[0] = float(time)
        told.add(500)
    assert said == [
        "  1,000 of 8,000 rows (12%), 500 rows/s, 0:14 left",
        "  2,500 of 8,000 rows (31%), 150 rows/s, 0:37 left",
        "  3,500 of 8,000 rows (43%), 100 rows/s, 0:45 left",
    ]


def test_a_build_announces_itself_before_anything_is_loaded(tmp_path, monkeypatch):
    described(tmp_path / "first")

    def loading(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.experiment_file.open_experiment", loading)
    file = str(tmp_path / "first" / "toy.yaml")
    _, said = command("build", file, "--stores", "there")
    line = "stage stage0: teacher (wide) on train, 2 views of each sample -> there; loading"
    assert said.splitlines()[0] == line
    assert "loading" not in command("build", file, "--stage", "other", "--stores", "there")[1]


def test_a_build_that_is_interrupted_says_that_it_goes_on(tmp_path, monkeypatch):
    described(tmp_path / "first")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.experiment_file.open_experiment", lambda *_: (None, None))
    monkeypatch.setattr(store_building, "build_stores", interrupted)
    code, said = command("build", str(tmp_path / "first" / "toy.yaml"))
    assert (code, "what is stored stays, and the same command goes on" in said) == (75, True)
    assert "last epoch" not in said
