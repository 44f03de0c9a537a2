"""What a person is told of stores: what is there, what is not used and why, what is in vain."""

import importlib
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import distill
from distill import ConfigError, DataError, Observer, StorageError
from distill.cli import main
from distill.store.folder import entries, size_text, unwritable
from distill.store.near import nearest, parts, references
from distill.store.rows import META, create, open_rows
from distill.store_building import build_stores
from distill.testing import ToyMLP, toy_experiment, toy_registry
from distill.training.note import counted
from distill.training.store_identity import code_of, digest

VIEWS = {"train": "train", "validate": "val", "batch_size": 8, "views": 2}
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
HINT = {"type": "MSELoss", "inputs": {"input": "student.body", "target": "teacher.body"}}
TRAIN = {"type": "ToyData", "params": {"size": 20}, "transforms": ["Jitter"]}


class Jitter:
    def __init__(self, size: float = 0.5):
        self.size = size

    def __call__(self, value):
        return value + self.size * torch.randn(value.shape)


class Shift:
    def __call__(self, value):
        return value + 1


class Parts(ToyMLP):
    def forward(self, inputs):
        return {"logits": super().forward(inputs)}


class OnLogits(nn.Module):
    def forward(self, input, target):
        return (input - target["logits"]).square().mean()


class Heard(Observer):
    def __init__(self):
        self.notes = []

    def stage_start(self, event):
        self.notes += event.notes


def registry(heard=None, **more):
    return toy_registry(
        models={"Parts": Parts},
        losses={"OnLogits": OnLogits},
        transforms={"Jitter": Jitter, "Shift": Shift},
        observers={"Heard": lambda: heard or Heard()},
        **more,
    )


def described(folder, store=None, *, teacher="ToyMLP", train=TRAIN, weights=0, role=None, **stage):
    folder.mkdir(parents=True)
    torch.manual_seed(weights)
    file = folder.parent / f"teacher{weights}.safetensors"
    save_file(ToyMLP(12).state_dict(), file)
    wide = {"type": teacher, "params": {"hidden": 12}, "checkpoint": str(file)}
    first = {
        "epochs": 2,
        "data": VIEWS,
        "criterion": {"match": MATCH},
        "teacher": {"model": "wide", "store": store, **(role or {})},
        **stage,
    }
    if "teachers" in stage:
        del first["teacher"]
    data = {"train": train, "val": {"type": "ToyData", "params": {"size": 12, "seed": 1}}}
    models = {"mlp": {"type": "ToyMLP", "params": {"hidden": 12}}, "wide": wide}
    observers = ["Heard", "ResultFiles"]
    return toy_experiment(folder, first, models=models, datasets=data, observers=observers)


def run(experiment, heard=None, known=None):
    folder = Path(experiment.document.file).parent
    known = known or registry(heard)
    where = folder.parent / "stores"
    return distill.run(experiment, registry=known, runs=folder / "runs", stores=where)


def stores(tmp_path):
    return sorted((tmp_path / "stores").iterdir())


def fault(tmp_path, *args, kind=ConfigError, **stage):
    with pytest.raises(kind) as caught:
        run(described(tmp_path / "first", *args, **stage))
    return str(caught.value)


def distill_command(*arguments):
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


IDENTITY = {
    "teacher": {
        "model": {"component": ["ToyMLP", {}]},
        "weights": "ab",
        "precision": "fp32",
        "code": {"m": "1"},
    },
    "asked": ['["teacher"]'],
    "kept": {"encoding": "float16", "top": 12},
    "data": {"component": ["ToyData", {}], "transforms": ["Jitter"], "samples": 20},
    "views": None,
    "mixed": None,
}


def notes_of(tmp_path, name, *args, **stage):
    heard = Heard()
    run(described(tmp_path / name, *args, **stage), heard)
    return heard.notes


def test_the_name_of_a_store_is_a_hash_over_its_parts(tmp_path):
    run(described(tmp_path / "first", True))
    (folder,) = stores(tmp_path)
    meta = json.loads((folder / META).read_text())
    assert digest(meta["identity"]) == folder.name
    assert parts(meta["identity"]) == meta["parts"]
    assert meta["about"] == {"teacher": "wide", "data": "train"}


def leaves(value, path=()):
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("path", list(leaves(IDENTITY)), ids=".".join)
def test_every_part_of_an_identity_decides(path):
    changed = json.loads(json.dumps(IDENTITY))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "something else"
    assert digest(changed) != digest(IDENTITY)
    one, other = parts(changed), parts(IDENTITY)
    differing = {name.partition(".")[0] for name in one if one[name] != other.get(name)}
    assert differing == {path[0]}


WIDER = {"type": "Jitter", "params": {"size": 0.6}}
MISSES = {
    "other weights of the teacher": {"weights": 1},
    "other transforms": {"train": {**TRAIN, "transforms": [WIDER]}},
    "another data set": {"train": {**TRAIN, "params": {"size": 19}}},
    "another number of views (2, now 3)": {"data": {**VIEWS, "views": 3}},
    "other values asked of the teacher (output, now body)": {"criterion": {"hint": HINT}},
    "another encoding (float16, now float32)": {"store": {"encoding": "float32"}},
    "another model or other parameters of it": {"teacher": "Parts", "criterion": {"hint": HINT}},
    "another precision (fp32, now bf16)": {"precision": "bf16"},
    "another data.in_memory (false, now true)": {"data": {**VIEWS, "in_memory": True}},
}


@pytest.mark.parametrize("difference", MISSES)
def test_a_miss_is_told_with_what_differs(tmp_path, difference):
    given = dict(MISSES[difference])
    is_hint = given.get("teacher") == "Parts"
    run(
        described(
            tmp_path / "first", True, criterion={"hint": HINT} if is_hint else {"match": MATCH}
        )
    )
    (first,) = stores(tmp_path)
    metrics = {"metrics": []} if is_hint else {}
    notes = notes_of(tmp_path, "second", given.pop("store", True), **given, **metrics)
    said = f"teacher: store {first.name[:8]} is not used: it was made with {difference}"
    assert said in notes


def test_the_first_store_and_one_that_is_used_are_not_compared(tmp_path):
    for name in ("first", "second"):
        assert not any("not used" in note for note in notes_of(tmp_path, name, True))


def made(folder, identity, **meta):
    create(folder / digest(identity), {"identity": identity, **meta}, 4, 2)
    return digest(identity)[:8]


def but(**changed):
    return {**IDENTITY, **changed}


def test_the_nearest_store_is_told_of_also_an_old_one_but_none_of_something_else(tmp_path):
    far = but(teacher={**IDENTITY["teacher"], "weights": "c"}, kept={"encoding": "int8"}, views=3)
    made(tmp_path, far)
    near = made(tmp_path, but(views=2))
    other_data = {"component": ["Other", {}], "transforms": [], "samples": 1}
    made(tmp_path, but(data=other_data, views=None))
    (tmp_path / "photos").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / META).write_text("{")
    said = nearest(tmp_path, IDENTITY, "wide")
    expected = "another number of views (2, now null)"
    assert said == f"store {near} is not used: it was made with {expected}"
    left = frozenset(path.name for path in tmp_path.iterdir() if path.name.startswith(near))
    assert "other weights" in nearest(tmp_path, IDENTITY, "wide", left)
    assert nearest(tmp_path / "none", IDENTITY, "wide") == ""


def test_a_store_that_differs_in_many_ways_is_of_something_else(tmp_path):
    alike = {"teacher": {**IDENTITY["teacher"], "weights": "c"}, "views": 3}
    made(tmp_path, but(**alike, kept={"encoding": "int8"}))
    assert "other weights" in nearest(tmp_path, IDENTITY, "wide")
    made(tmp_path / "others", but(**alike, kept={"encoding": "int8"}, asked=['["other"]']))
    assert nearest(tmp_path / "others", IDENTITY, "wide") == ""


def test_other_code_alone_is_told(tmp_path):
    made(tmp_path, but(teacher={**IDENTITY["teacher"], "code": {"m": "2"}}))
    assert nearest(tmp_path, IDENTITY, "wide").endswith("made with other code of the model")


def test_a_store_of_the_same_teacher_is_told_of_whatever_data_it_is_for(tmp_path):
    data = {"component": ["Other", {}], "transforms": ["Jitter"], "samples": 1}
    name = made(tmp_path, but(data=data), about={"teacher": "wide"})
    said = nearest(tmp_path, IDENTITY, "wide")
    assert said == f"store {name} is not used: it was made with another data set"
    assert nearest(tmp_path, IDENTITY, "other") == ""


TWO = {
    "teachers": {role: {"model": "wide", "store": True} for role in ("teacher", "second")},
    "criterion": {
        "match": MATCH,
        "hint": {**HINT, "inputs": {"input": "student.body", "target": "second.body"}},
    },
}


def test_stores_of_the_stage_s_other_teachers_are_not_told_of(tmp_path):
    notes = notes_of(tmp_path, "first", True, **TWO)
    assert len(stores(tmp_path)) == 2
    assert not any("not used" in note for note in notes)


def test_building_a_store_says_what_differs_too(tmp_path):
    where, said = tmp_path / "stores", []
    build_stores(described(tmp_path / "first", True), registry(), where, said.append)
    assert not any("not used" in line for line in said)
    other = described(tmp_path / "second", {"encoding": "int8"})
    build_stores(other, registry(), where, said.append)
    assert any(
        line.endswith("it was made with another encoding (float16, now int8)") for line in said
    )


def test_references_are_told_without_the_role():
    asked = ['["big"]', '["big", "logits"]', '["big.layer4:in"]', '["big.body", "0"]']
    assert references(asked) == ["output", "logits", "layer4:in", "body.0"]


def listed(folder):
    code, said = distill_command("store", "ls", "--stores", str(folder))
    assert code == 0
    head, *rows = said.splitlines()
    return said, head, rows


def test_a_store_made_before_names_were_noted_has_a_dash(tmp_path):
    made(tmp_path, IDENTITY)
    made(tmp_path, but(views=2), about={"teacher": "wide", "data": "train"})
    said, _, _ = listed(tmp_path)
    assert "– (ToyMLP)" in said
    assert "– (ToyData)" in said
    assert "wide (ToyMLP)" in said


def test_no_line_of_the_list_is_overlong(tmp_path):
    layers = [json.dumps([f"teacher.encoder.block{n}.attention"]) for n in range(9)]
    identity = but(asked=layers, kept={"encoding": "top_k", "top": 12})
    made(tmp_path, identity, about={"teacher": "a" * 80, "data": "b" * 80})
    (tmp_path / ("c" * 20)).mkdir()
    (tmp_path / ("c" * 20) / META).write_text("{")
    said, head, rows = listed(tmp_path)
    assert max(map(len, (head, *rows))) < 180
    assert "encoder.block0.attention, +8"[:28] in said
    assert "top_k (12)" in said
    assert "cccccccc  damaged" in said


def test_what_is_there_of_views_and_rows_is_listed(tmp_path):
    identity = but(views=2)
    create(tmp_path / "s", {"identity": identity}, 400, 2)
    rows = open_rows(tmp_path / "s")
    rows.checks["check"][::2] = 1
    (entry,) = entries(tmp_path)
    assert (entry.views, entry.filled) == ((1, 2), 200)
    rows.checks["check"][:399] = 1
    _, _, (row,) = listed(tmp_path)
    assert re.search(r"1 of 2 +400 +99% ", row), "not all, so not 100 %"


def test_a_store_goes_by_as_much_of_its_name_as_tells_it_apart(tmp_path):
    for name in ("abcdefgh01", "abcdefgh02", "b"):
        create(tmp_path / name, {"identity": IDENTITY}, 4, 2)
    _, _, rows = listed(tmp_path)
    assert {row.split()[0] for row in rows} == {"abcdefgh01", "abcdefgh02", "b"}
    where = ("--stores", str(tmp_path))
    assert distill_command("store", "verify", "abcdefgh02", *where) == (
        0,
        "abcdefgh02: 0 rows, all sound\n",
    )
    code, said = distill_command("store", "verify", "abc", *where)
    assert (code, "2 stores begin with 'abc'" in said) == (2, True)
    assert "there is no store 'x'" in distill_command("store", "verify", "x", *where)[1]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(512, "0.5 kB"), (3_200_000, "3.2 MB"), (10**10, "10.0 GB")]
)
def test_sizes_are_for_people(nbytes, text):
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(1, "view", "1 view"), (1000, "batch", "1,000 batches")]
)
def test_one_of_a_thing_is_no_plural(number, noun, text):
    assert counted(number, noun) == text


def test_the_report_counts_rows_that_were_there_and_computed(tmp_path):
    for name, told in (("first", "0 rows there before, 40 computed"), ("second", "40 rows there")):
        result = run(described(tmp_path / name, True))
        report = (result.directory / "report.md").read_text()
        folder = stores(tmp_path)[0]
        assert f"- stage0: teacher's outputs are stored in {folder}: {told}" in report
    plain = run(described(tmp_path / "plain"))
    assert "## Stored outputs" not in (plain.directory / "report.md").read_text()


def test_the_report_says_what_is_fast_and_in_memory(tmp_path):
    stage = {"role": {"fast": {"precision": "bf16"}}, "data": {**VIEWS, "in_memory": True}}
    result = run(described(tmp_path / "first", **stage))
    report = (result.directory / "report.md").read_text()
    assert re.search(
        r"- stage0: teacher is fast \(bf16\): on .* KL .* same top-1 for 1?\d\d", report
    )
    assert "- stage0: the 20 samples of data set 'train' are kept in memory on cpu" in report


def test_compiling_a_teacher_that_is_all_stored_is_told_to_do_nothing(tmp_path, monkeypatch):
    run(described(tmp_path / "first", True))
    monkeypatch.setattr("distill.training.ready.compiled", lambda *_, **__: nullcontext())
    notes = notes_of(tmp_path, "second", True, compile=["teacher"])
    assert "compile does nothing for teacher in training: it is read from its store" in notes
    assert not any("compile" in note for note in notes_of(tmp_path, "third", True))


def test_bad_samples_that_are_skipped_are_told_to_keep_the_teacher_loaded(tmp_path):
    data = {**VIEWS, "on_bad_sample": "skip"}
    said = "with any of them the store of teacher is never full and teacher is loaded in every run"
    assert any(said in note for note in notes_of(tmp_path, "first", True, data=data))
    assert not any("never full" in note for note in notes_of(tmp_path, "full", True, data=data))
    assert not any("never full" in n for n in notes_of(tmp_path, "raise", {"encoding": "int8"}))


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_begun(tmp_path):
    (tmp_path / "file").write_text("")
    heard, where = Heard(), tmp_path / "file" / "stores"
    experiment = described(tmp_path / "first", True)
    with pytest.raises(StorageError, match=r"Not a directory\); --stores DIR names another folder"):
        distill.run(experiment, registry=registry(heard), runs=tmp_path / "runs", stores=where)
    assert not list(tmp_path.glob("runs/**/metrics.jsonl")), "nothing has been told yet"
    assert unwritable(tmp_path / "new" / "inner") == ""
    assert not (tmp_path / "new").exists()


def test_a_full_store_may_lie_where_nothing_can_be_written(tmp_path, monkeypatch):
    run(described(tmp_path / "first", True))
    monkeypatch.setattr("distill.training.stored_stage.unwritable", lambda folder: "no")
    run(described(tmp_path / "second", True))
    with pytest.raises(StorageError, match="no"):
        run(described(tmp_path / "third", {"encoding": "int8"}))


TOP = {"encoding": "top_k", "top": 1}


def test_top_k_where_only_features_are_read_is_an_error_at_its_place(tmp_path):
    said = fault(tmp_path, TOP, criterion={"hint": HINT}, kind=ConfigError)
    assert "teacher.store.encoding: encoding top_k is for logits" in said
    assert "'teacher.body'" in said
    assert re.search(r"toy\.yaml:\d+", said)
    assert not (tmp_path / "stores").exists()


def test_a_check_without_data_finds_it_too(tmp_path):
    experiment = described(tmp_path / "first", TOP, criterion={"hint": HINT})
    with pytest.raises(ConfigError, match="encoding top_k is for logits"):
        distill.check(experiment, registry())


def test_top_k_of_an_output_in_parts_is_an_error(tmp_path):
    match = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher.logits"}}
    stage = {"teacher": "Parts", "criterion": {"match": match}, "metrics": []}
    assert "encoding top_k is for logits" in fault(tmp_path, TOP, **stage)


def test_top_k_of_an_output_that_turns_out_to_have_parts_is_an_error(tmp_path):
    stage = {"criterion": {"match": {**MATCH, "type": "OnLogits"}}, "metrics": []}
    said = fault(tmp_path, TOP, teacher="Parts", kind=DataError, **stage)
    assert "teacher.store: encoding top_k is for logits" in said
    assert "'teacher.logits'" in said


def test_features_beside_logits_in_top_k_are_told_to_be_float16(tmp_path):
    criterion = {"match": MATCH, "hint": HINT}
    notes = notes_of(tmp_path, "first", TOP, criterion=criterion)
    assert "encoding top_k is for the logits of teacher; 'teacher.body': float16" in notes
    assert not any("top_k" in note for note in notes_of(tmp_path, "second", TOP))


def module_of(tmp_path, monkeypatch, name, text):
    """Return a function that writes a module's file and imports it."""
    file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name), file


def test_a_change_in_a_namespace_package_of_a_teacher_makes_a_miss(tmp_path, monkeypatch):
    text = "from distill.testing import ToyMLP\nclass Model(ToyMLP):\n    pass\n"
    module, file = module_of(tmp_path, monkeypatch, "distill_namespaced.inner.models", text)
    assert sys.modules["distill_namespaced"].__file__ is None
    before = code_of([module.Model])
    assert code_of([module.Model]) == before
    file.write_text(text + "# changed\n")
    after = code_of([module.Model])
    assert before["distill_namespaced"] != after["distill_namespaced"]
    beside = file.with_name("layers.py")
    beside.write_text("")
    assert code_of([module.Model])["distill_namespaced"] != after["distill_namespaced"]


def test_a_change_of_a_transform_s_form_for_batches_makes_a_miss(tmp_path, monkeypatch):
    module, file = module_of(tmp_path, monkeypatch, "distill_batched_form", BATCHED)
    batched = {"Shift": module.Batched}
    train = {**TRAIN, "transforms": ["Shift"]}
    data = {**VIEWS, "in_memory": True}

    def stores_after(name):
        run(
            described(tmp_path / name, True, train=train, data=data),
            known=registry(batched_transforms=batched),
        )
        return len(stores(tmp_path))

    assert [stores_after("first"), stores_after("again")] == [1, 1]
    file.write_text(BATCHED + "# changed\n")
    assert stores_after("changed") == 2


BATCHED = """
class Batched:
    draws = 0
    pointwise = True

    def takes(self, value):
        return True

    def __call__(self, inputs, draws):
        return inputs + 1
"""
