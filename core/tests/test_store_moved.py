"""A store whose data set was moved: used for the same samples, never wrong for others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
from distill import Observer
from distill.data.source import Source
from distill.store.moved import find_moved, moved_places
from distill.store.near import nearest
from distill.store.rows import META, create, open_rows
from distill.testing import ToyData, ToyMLP, toy_experiment, toy_registry
from distill.training.store_identity import digest, samples_seen

SIZE = 100
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}


class Files:
    """Samples in files of a folder, in the order of their names."""

    classes = ToyData(1).classes

    def __init__(self, root: str, part: str = "all"):
        self.files = sorted(Path(root).glob("*.pt"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        value, label = torch.load(self.files[index])
        return value, label


class Listed:
    """What is left of a data set by a list of numbers in a file."""

    def __init__(self, dataset, file: str):
        self.dataset = dataset
        self.indices = json.loads(Path(file).read_text())
        self.classes = dataset.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


class Jitter:
    def __call__(self, value):
        return value + torch.randn(value.shape)


class Mix:
    """Mixes each sample with the one before it."""

    def __call__(self, inputs, targets):
        share = torch.rand(1)
        return share * inputs + (1 - share) * inputs.roll(1, 0), targets


class Teacher(ToyMLP):
    """Counts the samples of training that it is asked for."""

    ran = 0

    def forward(self, inputs):
        if inputs.device.type != "meta" and len(inputs) == BATCH:
            type(self).ran += len(inputs)
        return super().forward(inputs)


BATCH = 10


class Heard(Observer):
    def __init__(self):
        self.notes, self.misfits = [], 0

    def stage_start(self, event):
        self.notes += event.notes

    def epoch_end(self, event):
        self.misfits += event.misfits


def write(folder, changed=()):
    """Write the samples of a data set into a folder."""
    folder.mkdir(parents=True)
    data = ToyData(SIZE)
    for index in range(SIZE):
        value, label = data[index]
        torch.save((value + 1 if index in changed else value, label), folder / f"{index:03}.pt")
    return folder


def run(tmp_path, name, root, store=True, keys=None, **more):
    """Run an experiment on the samples in a folder; return its student and what was heard."""
    folder, heard = tmp_path / name, Heard()
    folder.mkdir()
    torch.manual_seed(0)
    file = tmp_path / "teacher.safetensors"
    if not file.exists():
        save_file(ToyMLP(12).state_dict(), file)
    train = {
        "type": "Files",
        "params": {"root": str(root), **more.pop("params", {})},
        **(keys or {}),
    }
    stage = {
        "epochs": 1,
        "data": {"train": "train", "batch_size": BATCH, **more},
        "criterion": {"match": MATCH},
        "teacher": {"model": "wide", "store": {"encoding": "float32"} if store else False},
        "metrics": [],
    }
    wide = {"type": "Teacher", "params": {"hidden": 12}, "checkpoint": str(file)}
    models = {"mlp": {"type": "ToyMLP", "params": {"hidden": 12}}, "wide": wide}
    data = {"train": train}
    known = toy_registry(
        datasets={"Files": Files},
        models={"Teacher": Teacher},
        transforms={"Jitter": Jitter},
        batch_transforms={"Mix": Mix},
        dataset_wrappers={"Listed": Listed},
        observers={"Heard": lambda: heard},
    )
    experiment = toy_experiment(
        folder, stage, seed=3, models=models, datasets=data, observers=["Heard"]
    )
    Teacher.ran = 0
    where = tmp_path / "stores"
    result = distill.run(experiment, registry=known, runs=folder / "runs", stores=where)
    return load_file(result.directory / "stage0" / "last.safetensors"), heard


def stores(tmp_path):
    return sorted((tmp_path / "stores").iterdir())


def are_equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


STAGES = {
    "plain": {},
    "views": {"views": 2, "keys": {"transforms": ["Jitter"]}},
    "mixed": {"views": 2, "batch_transforms": ["Mix"]},
    "in memory": {"in_memory": True},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_moved_folder_has_the_same_store_and_the_same_result(tmp_path, stage):
    first, _ = run(tmp_path, "first", write(tmp_path / "here"), **STAGES[stage])
    shutil.move(tmp_path / "here", tmp_path / "there")
    second, heard = run(tmp_path, "second", tmp_path / "there", **STAGES[stage])
    (store,) = stores(tmp_path)
    assert are_equal(first, second)
    assert (Teacher.ran, heard.misfits) == (0, 0)
    places = f"{tmp_path / 'here'} (now at {tmp_path / 'there'})"
    note = f"teacher: store {store.name[:8]} is used: it was made with the data set at {places}"
    assert note in heard.notes


def test_another_folder_that_looks_the_same_has_a_store_of_its_own(tmp_path):
    run(tmp_path, "first", write(tmp_path / "here"))
    other = write(tmp_path / "there", changed=range(SIZE))
    second, heard = run(tmp_path, "second", other)
    without, _ = run(tmp_path, "third", other, store=False)
    assert len(stores(tmp_path)) == 2
    assert are_equal(second, without)
    (note,) = [note for note in heard.notes if "not used" in note]
    places = f"{tmp_path / 'here'} (now at {tmp_path / 'there'})"
    assert note.endswith(f"made with the data set at {places}, where samples differ")


def test_a_file_changed_in_the_new_place_is_a_miss_of_its_row_alone(tmp_path):
    run(tmp_path, "first", write(tmp_path / "here"))
    looked_at = {int(i) for i in torch.linspace(0, SIZE - 1, 64).long()}
    changed = next(index for index in range(SIZE) if index not in looked_at)
    other = write(tmp_path / "there", changed=[changed])
    second, heard = run(tmp_path, "second", other)
    without, _ = run(tmp_path, "third", other, store=False)
    assert len(stores(tmp_path)) == 1
    assert heard.misfits == 1
    assert are_equal(second, without)


def test_a_moved_list_of_samples_is_followed_and_another_list_is_not(tmp_path):
    root = write(tmp_path / "here")
    for name, numbers in {"a": range(40), "b": range(40), "c": range(1, 41)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(list(numbers)))

    def used(name):
        listed = {"type": "Listed", "params": {"file": str(tmp_path / f"{name}.json")}}
        run(tmp_path, name, root, keys={"wrappers": [listed]})
        return len(stores(tmp_path))

    assert [used("a"), used("b"), used("c")] == [1, 1, 2]


def test_what_is_no_path_makes_another_store_whatever_the_samples(tmp_path):
    root = write(tmp_path / "here")
    run(tmp_path, "first", root)
    run(tmp_path, "second", root, params={"part": "train"})
    assert len(stores(tmp_path)) == 2


def identity(root="/a", **data):
    return {
        "teacher": {"model": {"component": ["ToyMLP", {}]}},
        "asked": [],
        "data": {"component": ["Files", {"root": root}], "wrappers": [], "samples": 4, **data},
    }


def made(folder, known, **meta):
    create(folder / digest(known), {"identity": known, **meta}, 4, 2)
    return folder / digest(known)


def test_a_store_is_followed_only_where_all_else_is_the_same_and_it_has_been_noted(tmp_path):
    wanted = identity("/b")
    made(tmp_path, identity(transforms=["Shift"]), seen=[7])
    made(tmp_path, identity("/c"), seen=[8])
    made(tmp_path, identity("/d"))
    assert find_moved(tmp_path, wanted, lambda: [7]) is None
    here = made(tmp_path, identity(), seen=[7])
    assert find_moved(tmp_path, wanted, lambda: [7]) == (here, [("/a", "/b")])
    assert find_moved(tmp_path, wanted, lambda: [8]) is not None
    (here / META).write_text("{")
    assert find_moved(tmp_path, wanted, lambda: [7]) is None
    assert find_moved(tmp_path / "none", wanted, lambda: [7]) is None


def test_a_store_with_a_collate_function_of_its_own_is_not_followed(tmp_path):
    made(tmp_path, identity(collate=["padded", {}]), seen=[7])
    assert find_moved(tmp_path, identity("/b", collate=["padded", {}]), lambda: [7]) is None
    here = made(tmp_path, identity(collate=None), seen=[7])
    assert find_moved(tmp_path, identity("/b", collate=None), lambda: [7]) == (here, [("/a", "/b")])


def test_data_of_which_no_sample_can_be_read_are_not_taken_for_the_same(tmp_path):
    made(tmp_path, identity(), seen=[0, 0])
    assert find_moved(tmp_path, identity("/b"), lambda: [0, 0]) is None


def test_samples_are_not_read_where_no_store_comes_into_question(tmp_path):
    made(tmp_path, identity(transforms=["Shift"]), seen=[7])

    def read():
        raise AssertionError

    assert find_moved(tmp_path, identity("/b"), read) is None


def test_a_data_set_elsewhere_that_differs_in_more_is_told_with_both(tmp_path):
    name = made(tmp_path, identity(transforms=["Shift"]), about={"teacher": "wide"}).name[:8]
    said = nearest(tmp_path, identity("/b", transforms=[]), "wide")
    places = "the data set at /a (now at /b)"
    assert said == f"store {name} is not used: it was made with {places}, other transforms"


def test_only_paths_are_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = identity("photos"), identity("pictures")
    assert moved_places(one, other) == []
    (tmp_path / "pictures").mkdir()
    assert moved_places(one, other) == [("photos", "pictures")]
    assert moved_places(one, one) == []
    assert moved_places(identity("/a"), identity(3)) == []
    assert moved_places(identity("/a"), identity("/" + "b" * 9000)) != []


def test_samples_are_told_apart_by_what_they_hold_and_drawn_alike():
    source = Source("train", ToyData(5), transforms=[Jitter()])
    torch.manual_seed(1)
    seen = samples_seen(source)
    torch.manual_seed(2)
    assert samples_seen(source) == seen
    assert len(set(seen)) == 5
    assert samples_seen(Source("train", ToyData(5, seed=1))) != seen


def test_the_rows_of_a_moved_store_are_those_of_its_name(tmp_path):
    run(tmp_path, "first", write(tmp_path / "here"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    run(tmp_path, "second", tmp_path / "there")
    (store,) = stores(tmp_path)
    meta = json.loads((store / META).read_text())
    assert meta["identity"]["data"]["component"][1] == {"root": str(tmp_path / "here")}
    assert open_rows(store).filled == SIZE
