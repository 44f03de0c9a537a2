"""Stored outputs of teachers in a run: the same result as without, and never a wrong one."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import distill
from distill import ConfigError, Observer
from distill.cli import main
from distill.config.load import draft
from distill.config.yaml_document import read
from distill.data.batch import collate
from distill.errors import DataError
from distill.forked import Forked
from distill.store.folder import remove
from distill.store.rows import open_rows
from distill.testing import ToyData, ToyMLP, run_processes, toy_experiment, toy_registry
from distill.training.check import check as find_faults

SCRIPT = Path(__file__).with_name("stored_run.py")
EXACT = {"encoding": "float32"}
VIEWS = {"train": "train", "validate": "val", "batch_size": 8, "views": 2}
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
HINT = {
    "type": "MSELoss",
    "inputs": {"input": "student.body", "target": "teacher.body"},
}
TRAIN = {"type": "ToyData", "params": {"size": 20}, "transforms": ["Jitter"]}
SEED = {"seed": 3}
VAL = {"type": "ToyData", "params": {"size": 12, "seed": 1}}


class Jitter:
    def __init__(self, size: float = 0.5):
        self.size = size

    def __call__(self, value):
        return value + self.size * torch.randn(value.shape)


class Shift:
    def __init__(self, by: float = 1.0):
        self.by = by

    def __call__(self, value):
        return value + self.by


class Mix:
    """Mixes each sample with the one before it."""

    def __call__(self, inputs, targets):
        share = torch.rand(1)
        return share * inputs + (1 - share) * inputs.roll(1, 0), targets


class Listed(ToyData):
    """Toy data in an order of its own."""

    def __init__(self, size: int = 20, order: list[int] | None = None, changed: int | None = None):
        super().__init__(size)
        if order is not None:
            self.inputs, self.labels = self.inputs[order], [self.labels[i] for i in order]
        if changed is not None:
            self.inputs[changed] += 1e-6


class Told(ToyData):
    """Data whose labels change between the samples looked at, with nothing in the file to tell."""

    looked_at = frozenset(numpy.linspace(0, 639, 64, dtype=int).tolist())
    is_changed = False

    def __init__(self):
        super().__init__(640, seed=1)
        if self.is_changed:
            labels = enumerate(self.labels)
            self.labels = [n if i in self.looked_at else (n + 1) % 3 for i, n in labels]


class Teacher(ToyMLP):
    """Counts its forwards of more than the samples that are looked at before training."""

    ran = 0

    def forward(self, inputs):
        if inputs.device.type != "meta" and self.where == "train":
            type(self).ran += len(inputs)
        return super().forward(inputs)

    where = "train"


class Neighbourly(ToyMLP):
    """What it gives for a sample depends on the others."""

    def forward(self, inputs):
        return super().forward(inputs - inputs.mean(0))


class Huge(ToyMLP):
    def forward(self, inputs):
        return 1e5 * super().forward(inputs)


class Parts(ToyMLP):
    def forward(self, inputs):
        return {"logits": super().forward(inputs), "other": [inputs]}


class Soft(nn.Module):
    """KD's soft term."""

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher):
        sides = student / self.temperature, teacher / self.temperature
        return F.kl_div(*(side.log_softmax(1) for side in sides), log_target=True)


class Unlike(Soft):
    """Has a temperature that is no number."""

    temperature = property(lambda self: torch.tensor(9.0), lambda self, value: None)


class Notes(Observer):
    """Keeps what the run says; ends it at an epoch."""

    kill = None

    def __init__(self):
        self.notes, self.teachers, self.misfits = [], [], []

    def stage_start(self, event):
        self.notes += event.notes
        self.teachers.append(event.teachers)

    def epoch_end(self, event):
        self.misfits.append(event.misfits)
        if event.position.epoch == self.kill:
            raise KeyboardInterrupt


def registry(heard=None, **more):
    models = {"Teacher": Teacher, "Neighbourly": Neighbourly, "Huge": Huge, "Parts": Parts}
    return toy_registry(
        models=models,
        transforms={"Jitter": Jitter, "Shift": Shift},
        batch_transforms={"Mix": Mix},
        losses={"Soft": Soft, "Unlike": Unlike},
        datasets={"Listed": Listed, "Told": Told},
        observers={"Notes": lambda: heard or Notes()},
        collates={"mixing": mixing_collate},
        **more,
    )


def checkpoint(folder, seed=0, hidden=12):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    file = folder / f"teacher{seed}.safetensors"
    save_file(ToyMLP(hidden).state_dict(), file)
    return str(file)


def described(folder, store=None, teacher="ToyMLP", train=TRAIN, keys=None, **stage):
    wide = {"type": teacher, "params": {"hidden": 12}, "checkpoint": checkpoint(folder.parent)}
    first = {
        "epochs": 4,
        "data": VIEWS,
        "criterion": {"match": MATCH},
        **stage,
        "teacher": {"model": "wide", "store": store, **(stage.get("role") or {})},
    }
    first.pop("role", None)
    keys = {"datasets": {"train": train, "val": VAL}, "observers": ["Notes"], **(keys or SEED)}
    models = {"mlp": {"type": "ToyMLP", "params": {"hidden": 12}}, "wide": wide}
    return toy_experiment(folder, first, models=models, **keys)


def run(experiment, folder=None, heard=None):
    folder = folder or Path(experiment.document.file).parent
    stores = Path(experiment.document.file).parent.parent / "stores"
    return distill.run(experiment, registry=registry(heard), runs=folder / "runs", stores=stores)


def student(result):
    return load_file(result.directory / "stage0" / "last.safetensors")


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stores(tmp_path):
    return sorted((tmp_path / "stores").iterdir())


CRITERIA = {
    "output": {"match": MATCH},
    "layer": {"hint": HINT},
    "both": {"match": MATCH, "hint": HINT},
}


@pytest.mark.parametrize(
    ("criterion", "more"),
    [
        ("output", {"workers": 2}),
        ("layer", {}),
        ("both", {"views_at_once": 2}),
    ],
    ids=str,
)
def test_a_run_with_a_store_ends_in_the_same_bits_as_one_without(tmp_path, criterion, more):
    stage = {"criterion": CRITERIA[criterion], "data": {**VIEWS, **more}}
    without = run(described(tmp_path / "plain", **stage))
    filling = run(described(tmp_path / "first", EXACT, **stage))
    reading = run(described(tmp_path / "second", EXACT, **stage))
    assert are_equal(student(filling), student(without))
    assert are_equal(student(reading), student(without))
    assert len(stores(tmp_path)) == 1


def test_mixed_samples_are_stored_with_their_partners(tmp_path):
    stage = {"data": {**VIEWS, "batch_transforms": ["Mix"]}}
    without = run(described(tmp_path / "plain", **stage))
    filling = run(described(tmp_path / "first", EXACT, **stage))
    Teacher.ran = 0
    reading = run(described(tmp_path / "second", EXACT, **stage))
    assert are_equal(student(filling), student(without))
    assert are_equal(student(reading), student(without))
    rows = open_rows(stores(tmp_path)[0])
    assert rows.filled == len(rows) == 40


def test_a_teacher_that_is_stored_is_not_loaded(tmp_path):
    experiment = described(tmp_path / "first", True, teacher="Teacher")
    Teacher.ran = 0
    run(experiment)
    assert Teacher.ran > 0
    first, Teacher.ran, heard = Teacher.ran, 0, Notes()
    run(described(tmp_path / "second", True, teacher="Teacher"), heard=heard)
    assert (first > 0, Teacher.ran) == (True, 0)
    assert any(
        "all of 40 are there, and the model, measured before, is loaded only if" in n
        for n in heard.notes
    )
    assert heard.teachers[0]["teacher"].keys() == {"accuracy"}


def measured(tmp_path, name, store=True, **more):
    """Return what the teacher of a run reaches, and whether it was loaded for that."""
    heard, Teacher.ran = Notes(), 0
    run(described(tmp_path / name, store, teacher="Teacher", **more), heard=heard)
    (teachers,) = heard.teachers
    return teachers["teacher"]["accuracy"], Teacher.ran > 0


def test_a_damaged_measurement_is_made_again_and_kept(tmp_path):
    reached, _ = measured(tmp_path, "first")
    file = stores(tmp_path)[0] / "measured.json"
    text = file.read_text()
    assert text.count(f'"accuracy": {reached}') == 1
    file.write_text(text.replace(f'"accuracy": {reached}', f'"accuracy": {reached / 2}'))
    assert measured(tmp_path, "second") == (reached, True)
    assert json.loads(file.read_text()) == json.loads(text)
    assert measured(tmp_path, "third") == (reached, False)


def test_a_teacher_is_measured_again_where_labels_changed_beside_the_samples_looked_at(
    tmp_path, monkeypatch
):
    keys = {"datasets": {"train": TRAIN, "val": {"type": "Told"}}, "seed": 3}
    reached, _ = measured(tmp_path, "first", keys=keys)
    assert measured(tmp_path, "second", keys=keys) == (reached, False)
    monkeypatch.setattr(Told, "is_changed", True)
    without, _ = measured(tmp_path, "plain", store=None, keys=keys)
    assert without != reached
    assert measured(tmp_path, "third", keys=keys) == (without, True)


def test_a_run_that_is_over_holds_no_store(tmp_path, monkeypatch):
    opened = []
    # Kept, since a store that nobody refers to is let go of by itself.
    kept = lambda folder: opened.append(open_rows(folder)) or opened[-1]  # noqa: E731
    monkeypatch.setattr("distill.store.rows.open_rows", kept)
    run(described(tmp_path / "filling", True))
    run(described(tmp_path / "reading", True))
    assert len(opened) > 1
    assert remove(stores(tmp_path)[0]) > 0


def test_each_view_is_computed_once(tmp_path):
    Teacher.ran = 0
    run(described(tmp_path / "one", True, teacher="Teacher", epochs=2))
    two = Teacher.ran
    Teacher.ran = 0
    run(described(tmp_path / "other" / "six", True, teacher="Teacher", epochs=6))
    assert Teacher.ran == two


def changed_weights(folder):
    file = Path(checkpoint(folder.parent))
    weights = load_file(file)
    weights["head.bias"][0] += 1e-6
    save_file(weights, file)


CHANGES = {
    "a weight": {"weights": True},
    "a transform's parameter": {
        "train": {**TRAIN, "transforms": [{"type": "Jitter", "params": {"size": 0.6}}]}
    },
    "a transform": {"train": {**TRAIN, "transforms": ["Shift"]}},
    "a sample": {"train": {"type": "Listed", "params": {"changed": 4}}},
    "a line of the list": {"train": {"type": "Listed", "params": {"order": [1, 0, *range(2, 20)]}}},
    "the samples": {"train": {"type": "ToyData", "params": {"size": 19}}},
    "the number of views": {"data": {**VIEWS, "views": 3}},
    "the layer": {"criterion": {"hint": HINT}},
    "the encoding": {"store": EXACT},
    "the model's code": {"teacher": "Teacher"},
    "the precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_a_miss(tmp_path, change):
    run(described(tmp_path / "first", True))
    given = dict(CHANGES[change])
    experiment = described(tmp_path / "second", given.pop("store", True), **_without(given))
    if given.get("weights"):
        changed_weights(tmp_path / "second")
    run(experiment)
    assert len(stores(tmp_path)) == 2


def _without(given):
    return {key: value for key, value in given.items() if key != "weights"}


class Quiet(ToyData):
    """Data whose samples or order change with nothing in the file to tell."""

    change = None

    def __getitem__(self, index):
        if self.change == "order" and index < 2:
            index = 1 - index
        value, label = super().__getitem__(index)
        return (value + 1e-6 if self.change == "sample" and index == 4 else value), label


@pytest.mark.parametrize(("change", "rows"), [("sample", 2), ("order", 4), (None, 0)])
def test_a_change_that_the_file_does_not_tell_of_makes_a_miss_of_its_rows(
    tmp_path, change, rows, monkeypatch
):
    quiet = {"type": "Quiet", "params": {"size": 20}}
    parts = {"datasets": {"Quiet": Quiet}}

    def run_it(name, store):
        experiment = described(tmp_path / name, store, teacher="Teacher", train=quiet)
        where = tmp_path / name / "runs"
        known = toy_registry(
            models={"Teacher": Teacher}, observers={"Notes": Notes}, datasets=parts["datasets"]
        )
        stores = tmp_path / "stores"
        return distill.run(experiment, registry=known, runs=where, stores=stores)

    run_it("first", EXACT)
    before = open_rows(stores(tmp_path)[0]).checks.copy()
    monkeypatch.setattr(Quiet, "change", change)
    changed = run_it("second", EXACT)
    without = run_it("third", None)
    assert len(stores(tmp_path)) == 1
    assert are_equal(student(changed), student(without))
    after = open_rows(stores(tmp_path)[0]).checks
    assert int((before["fingerprint"] != after["fingerprint"]).sum()) == rows


def test_damaged_rows_are_computed_anew_by_a_teacher_loaded_late(tmp_path):
    first = run(described(tmp_path / "first", EXACT, teacher="Teacher"))
    rows = open_rows(stores(tmp_path)[0])
    rows.rows[7, 3] ^= 16
    rows.rows[20:25] = 0
    Teacher.ran, heard = 0, Notes()
    second = run(described(tmp_path / "second", EXACT, teacher="Teacher"), heard=heard)
    assert are_equal(student(first), student(second))
    assert sum(heard.misfits) == 6
    assert 0 < Teacher.ran <= 6 * 8
    found = rows.damaged(numpy.arange(40))
    assert len(found) == 0


def test_a_file_cut_short_gives_the_same_result(tmp_path):
    stage = {"criterion": CRITERIA["both"]}
    first = run(described(tmp_path / "first", EXACT, **stage))
    for name in ("rows.bin", "checks.bin"):
        file = stores(tmp_path)[0] / name
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 3)
        again = run(described(tmp_path / name, EXACT, **stage))
        assert are_equal(student(first), student(again))


def test_a_run_killed_while_filling_goes_on_to_the_result_without_a_store(tmp_path):
    without = run(described(tmp_path / "plain"))
    heard = Notes()
    heard.kill = 1
    with pytest.raises(KeyboardInterrupt):
        run(described(tmp_path / "first", EXACT), heard=heard)
    assert 0 < open_rows(stores(tmp_path)[0]).filled < 40
    resumed = run(described(tmp_path / "first", EXACT))
    assert are_equal(student(resumed), student(without))
    assert open_rows(stores(tmp_path)[0]).filled == 40


def test_a_run_killed_while_it_writes_rows_ends_as_one_without_a_store(tmp_path):
    without = run(described(tmp_path / "plain"))
    dying = Forked(str(SCRIPT), [str(tmp_path / "first"), "14"])
    code, said = dying.wait(120)
    assert code == -signal.SIGKILL, said
    rows = open_rows(stores(tmp_path)[0])
    assert 8 < rows.filled < 20
    assert len(rows.damaged(numpy.arange(40))) == 1
    code, said = Forked(str(SCRIPT), [str(tmp_path / "first")]).wait(120)
    assert code == 0, said
    resumed = load_file(tmp_path / "first" / "runs" / "toy" / "stage0" / "last.safetensors")
    assert are_equal(resumed, student(without))
    assert rows.filled == 40
    assert len(rows.damaged(numpy.arange(40))) == 0


def test_a_control_acts_on_what_is_stored(tmp_path):
    role = {"control": "shuffled_classes"}
    plain = run(described(tmp_path / "plain"))
    without = run(described(tmp_path / "control", role=role))
    filling = run(described(tmp_path / "first", EXACT, role=role))
    reading = run(described(tmp_path / "second", EXACT, role=role))
    assert not are_equal(student(plain), student(without))
    assert are_equal(student(filling), student(without))
    assert are_equal(student(reading), student(without))


def test_parts_of_an_output_are_stored(tmp_path):
    match = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher.logits"}}
    stage = {"teacher": "Parts", "criterion": {"match": match}, "metrics": []}
    without = run(described(tmp_path / "plain", **stage))
    run(described(tmp_path / "first", EXACT, **stage))
    reading = run(described(tmp_path / "second", EXACT, **stage))
    assert are_equal(student(reading), student(without))


@pytest.mark.parametrize("encoding", ["float16", "int8", "float32"])
def test_what_a_student_learns_from_is_the_same_while_filling_and_after(tmp_path, encoding):
    store = {"encoding": encoding}
    filling = run(described(tmp_path / "first", store))
    reading = run(described(tmp_path / "second", store))
    assert are_equal(student(filling), student(reading))


def test_one_seed_fills_the_store_for_the_others(tmp_path):
    run(described(tmp_path / "first", True, teacher="Teacher"))
    once, Teacher.ran = Teacher.ran, 0
    run(described(tmp_path / "second", True, teacher="Teacher", keys={"seeds": [4, 5]}))
    assert (once > 0, Teacher.ran) == (True, 0)


def fault(tmp_path, *args, kind=ConfigError, **stage):
    with pytest.raises(kind) as caught:
        run(described(tmp_path / "first", *args, **stage))
    return str(caught.value)


def test_random_transforms_without_views_are_refused_with_the_two_ways_out(tmp_path):
    data = {"train": "train", "batch_size": 8}
    said = fault(tmp_path, True, data=data)
    assert "stages.stage0.teacher.store: its transforms draw random numbers" in said
    assert "data: {views: 4}" in said
    assert "take out what is random" in said
    assert not (tmp_path / "stores").exists()


def test_batch_transforms_without_views_are_refused(tmp_path):
    data = {"train": "val", "batch_size": 8, "batch_transforms": ["Mix"]}
    assert "Mix draws in every epoch" in fault(tmp_path, True, data=data)


def mixing_collate():
    def put_together(samples):
        batch = collate(samples)
        return replace(batch, inputs=batch.inputs * torch.rand(1))

    return put_together


@pytest.mark.parametrize("views", [None, 2])
def test_a_collate_function_that_draws_is_refused_with_views_too(tmp_path, views):
    train = {"type": "ToyData", "params": {"size": 20}, "collate": "mixing"}
    data = {"train": "train", "batch_size": 8, "views": views}
    said = fault(tmp_path, True, train=train, data=data)
    assert "has a collate function that draws random numbers" in said


def test_a_redesigned_teacher_is_refused(tmp_path):
    said = fault(tmp_path, True, role={"redesign": "whole"})
    assert "stages.stage0.teacher.store: is for the model as it is: whole may add" in said


def test_a_damaged_checkpoint_is_told_at_its_key(tmp_path):
    experiment = described(tmp_path / "first", True)
    Path(checkpoint(tmp_path)).write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"models.wide.checkpoint: .* cannot be read"):
        run(experiment)


def test_a_store_without_randomness_needs_no_views(tmp_path):
    data = {"train": "val", "batch_size": 8}
    run(described(tmp_path / "first", True, data=data))
    assert open_rows(stores(tmp_path)[0]).filled == 12


def test_a_teacher_that_looks_at_the_whole_batch_is_refused(tmp_path):
    said = fault(tmp_path, True, teacher="Neighbourly", kind=DataError)
    assert "depends on the other samples of the batch" in said


def test_values_beyond_float16_are_refused_and_float32_holds_them(tmp_path):
    assert "encoding: float32" in fault(tmp_path, True, teacher="Huge", kind=DataError)
    criterion = {"match": {**MATCH, "weight": 1e-12}}
    run(described(tmp_path / "second", EXACT, teacher="Huge", epochs=1, criterion=criterion))


def test_two_processes_fill_one_store(tmp_path):
    run_processes(SCRIPT, str(tmp_path / "two"))
    two = load_file(tmp_path / "two" / "runs" / "toy" / "stage0" / "last.safetensors")
    without = run(described(tmp_path / "plain"))
    rows = open_rows(stores(tmp_path)[0])
    assert rows.filled == 40
    for key, value in student(without).items():
        torch.testing.assert_close(two[key], value, atol=1e-6, rtol=1e-5)


PLUGIN = """
import torch
from distill import hookimpl

class Jitter:
    def __call__(self, value):
        return value + torch.randn(value.shape)

@hookimpl
def distill_transforms():
    return {"Jitter": Jitter}
"""


@pytest.fixture
def on_disk(tmp_path, toys, monkeypatch, only_core):
    monkeypatch.chdir(tmp_path)
    Path("plugin.py").write_text(PLUGIN)
    described(tmp_path / "first", True)
    text = (tmp_path / "first" / "toy.yaml").read_text().replace("- Notes", "- Console")
    Path("toy.yaml").write_text(text)
    return ["-p", "plugin.py", "-p", str(toys)]


def distill_command(*arguments):
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_a_store_is_built_listed_verified_and_removed(on_disk, tmp_path):
    code, said = distill_command("store", "build", "toy.yaml", *on_disk)
    assert (code, "40 of 40 rows are there" in said) == (0, True)
    code, said = distill_command("run", "toy.yaml", *on_disk)
    assert "all of 40 are there, and the model, measured before, is loaded only if" in said
    (name,) = [path.name for path in stores(tmp_path)]
    said = distill_command("store", "ls")[1].splitlines()
    *cells, size, used = [cell for cell in said[1].split("  ") if cell]
    about = [name[:8], "wide (ToyMLP)", "output", "train (ToyData)"]
    assert [cell.strip() for cell in cells] == [*about, "2 of 2", "40", "100%", "float16"]
    assert (size[-2:], used) == ("kB", "today")
    open_rows(stores(tmp_path)[0]).rows[0, 0] ^= 1
    assert "40 rows, 1 damaged, to be computed anew" in distill_command("store", "verify")[1]
    assert "39 rows, all sound" in distill_command("store", "verify", name[:5])[1]
    assert "would remove" in distill_command("store", "gc", "--unused", "0", "--dry-run")[1]
    assert stores(tmp_path)
    nothing = "nothing to remove in stores (none damaged, half made or unused for 30 days)\n"
    assert distill_command("store", "gc") == (0, nothing)
    assert f"removed stores/{name}" in distill_command("store", "gc", "--unused", "0", "-y")[1]
    assert stores(tmp_path) == []
    assert distill_command("store", "ls")[1] == "no stores in stores\n"


def test_building_needs_a_store_and_a_teacher_that_is_there(on_disk, monkeypatch):
    command = ("store", "build", "toy.yaml", *on_disk, "-s", "stages.0.teacher.store=false")
    code, said = distill_command(*command)
    assert code == 2
    assert "no teacher has the key 'store'" in said
    monkeypatch.setenv("RANK", "1")  # of several processes one says it
    assert distill_command(*command) == (2, "")


def test_what_is_noted_of_a_store_is_plain_data(tmp_path):
    run(described(tmp_path / "first", True))
    meta = json.loads((stores(tmp_path)[0] / "meta.json").read_text())
    assert meta["identity"]["teacher"]["model"]["component"][0] == "ToyMLP"
    assert meta["rows"] == 40


def test_a_module_of_the_teacher_keeps_it_loaded(tmp_path):
    head = {"module": "teacher.head", "inputs": {"input": "student.body"}}
    match = {"type": "MSELoss", "inputs": {"input": "head", "target": "teacher"}}
    stage = {"auxiliary": {"head": head}, "criterion": {"match": match}}
    without = run(described(tmp_path / "plain", **stage))
    run(described(tmp_path / "first", EXACT, **stage))
    heard = Notes()
    reading = run(described(tmp_path / "second", EXACT, **stage), heard=heard)
    assert are_equal(student(reading), student(without))
    assert any(note.endswith("all of 40 are there") for note in heard.notes)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ({"store": {"top": 3}}, "teacher.store.top: is for encoding: top_k"),
        ({"fast": {}}, "teacher.fast: names nothing to do"),
        ({"mode": "train"}, "teacher.store: is for a teacher in mode: eval"),
    ],
)
def test_what_a_teachers_keys_say_in_vain_is_a_fault(tmp_path, role, message):
    assert message in fault(tmp_path, True, role=role)


TOP = {"encoding": "top_k", "top": 2}
SOFT = {"type": "Soft"}
WARM = {"type": "Soft", "params": {"temperature": 2.0}}
ON_FEATURES = {**WARM, "inputs": {"student": "student.body", "teacher": "teacher.body"}}


@pytest.mark.parametrize(
    ("store", "criterion", "message"),
    [
        (
            TOP,
            {"kd": SOFT, "match": MATCH},
            "store.encoding: encoding top_k keeps the mass of the other classes at temperature "
            "1.0, but a loss takes it at another: 'kd' at 4.0; write store: {encoding: top_k, "
            "top: 2, temperature: 4.0}, or encoding: float16",
        ),
        (
            {**TOP, "temperature": 3},
            {"kd": WARM},
            "store.temperature: encoding top_k keeps the mass of the other classes at temperature "
            "3, but a loss takes it at another: 'kd' at 2.0; write store: {encoding: top_k, "
            "top: 2, temperature: 2.0}, or encoding: float16",
        ),
        (
            {**TOP, "temperature": 4},
            {"kd": SOFT, "warm": WARM},
            "takes it at another: 'kd' at 4.0, 'warm' at 2.0; write encoding: float16",
        ),
    ],
    ids=["none written", "another", "several"],
)
def test_top_k_at_another_temperature_than_a_loss_is_refused_at_its_place(
    tmp_path, store, criterion, message
):
    said = fault(tmp_path, store, criterion=criterion)
    assert said.count("keeps the mass") == 1
    assert "stages.stage0.teacher.store" in said
    assert message in said
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize(
    ("store", "criterion"),
    [
        ({**TOP, "temperature": 4}, {"kd": SOFT, "match": MATCH, "hint": ON_FEATURES}),
        (TOP, {"kd": {"type": "Unlike"}}),
        ({"encoding": "float16"}, {"kd": SOFT}),
    ],
    ids=["the same", "no number", "float16"],
)
def test_only_numbers_of_losses_that_take_the_logits_have_to_be_the_temperature_of_top_k(
    tmp_path, store, criterion
):
    distill.check(described(tmp_path / "first", store, criterion=criterion), registry())


def test_of_a_temperature_that_cannot_be_nothing_more_is_told(tmp_path):
    described(tmp_path / "first", {**TOP, "temperature": 4}, criterion={"kd": SOFT})
    file = tmp_path / "first" / "toy.yaml"
    file.write_text(file.read_text().replace("temperature: 4", "temperature: -4"))
    experiment, told = draft(read(file))
    assert len(told) == 1
    assert find_faults(experiment, registry()) == []


def test_a_damaged_store_is_begun_again_and_told(tmp_path, capfd):
    first = run(described(tmp_path / "first", EXACT))
    (stores(tmp_path)[0] / "meta.json").write_text("{")
    second = run(described(tmp_path / "second", EXACT))
    assert "is damaged, and begun again" in capfd.readouterr().err
    assert are_equal(student(first), student(second))


def test_verifying_a_damaged_store_ends_with_a_code_of_its_own(on_disk, tmp_path):
    distill_command("store", "build", "toy.yaml", *on_disk)
    assert distill_command("store", "verify")[0] == 0
    open_rows(stores(tmp_path)[0]).rows[0, 0] ^= 1
    assert distill_command("store", "verify")[0] == 5


def test_a_store_that_may_only_be_read_is_used_and_told_of(tmp_path, monkeypatch):
    write_text, data = Path.write_text, {"train": "val", "validate": "val", "batch_size": 8}

    def refused(path, *args, **options):
        if "measured" in path.name:
            raise PermissionError(13, "Permission denied")
        return write_text(path, *args, **options)

    monkeypatch.setattr("distill.store.rows.os.access", lambda *_: False)
    monkeypatch.setattr(Path, "write_text", refused)
    heard = Notes()
    assert student(run(described(tmp_path / "first", True, data=data), heard=heard))
    told = "may only be read: what is missing is computed in every epoch and not kept"
    assert any(told in note for note in heard.notes)


def test_a_store_that_may_only_be_read_is_not_built_unless_it_is_full(
    on_disk, tmp_path, monkeypatch
):
    distill_command("store", "build", "toy.yaml", *on_disk)
    rows = open_rows(stores(tmp_path)[0])
    access = os.access
    monkeypatch.setattr(os, "access", lambda f, *how: ".bin" not in str(f) and access(f, *how))
    assert distill_command("store", "build", "toy.yaml", *on_disk)[0] == 0
    rows.forget(numpy.array([3]))
    code, said = distill_command("store", "build", "toy.yaml", *on_disk)
    assert code not in (0, 70)
    assert "may only be read; --stores DIR names another folder" in said
