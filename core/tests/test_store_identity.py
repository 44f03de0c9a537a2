"""What a store depends on beside what its file says: never a row of something else."""

import importlib
import json
import math
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import distill
from distill import Batch, ConfigError, DataError, NumericalError, Observer
from distill.data.batch import collate
from distill.store.rows import open_rows
from distill.testing import ToyMLP, toy_experiment, toy_registry
from distill.training.code_identity import code_of

FIELDS = ("target", "index")
EXACT = {"encoding": "float32"}
DATA = {"train": "train", "batch_size": 8}
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}


class Scaled(ToyMLP):
    """Reads a factor from a file."""

    def __init__(self, file, hidden=12):
        super().__init__(hidden)
        with open(file) as opened:
            self.factor = json.load(opened)

    def forward(self, inputs):
        return self.factor * super().forward(inputs)


class Buffered(ToyMLP):
    """Has a buffer that no checkpoint holds."""

    factor = 1.0

    def __init__(self, hidden=12):
        super().__init__(hidden)
        self.register_buffer("scale", torch.tensor(self.factor), persistent=False)

    def forward(self, inputs):
        return self.scale * super().forward(inputs)


class Masked(ToyMLP):
    """Leaves a class out."""

    def forward(self, inputs):
        return super().forward(inputs).masked_fill(torch.tensor([False, False, True]), -math.inf)


class OfTwo(nn.Module):
    """Compares two classes."""

    def forward(self, student, teacher):
        return (student - teacher)[:, :2].square().mean()


class Padded(nn.Module):
    """The mean of a sequence and of what it is padded with."""

    def __init__(self, hidden=12):
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(self, inputs):
        return self.head(inputs.mean(1, keepdim=True))


class Sequences(torch.utils.data.Dataset):
    """The longest comes first."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.ones(20 - index), index % 3


class WithGap(torch.utils.data.Dataset):
    """Numbers with one gap, which is no number."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((4,), math.nan if index == 2 else float(index)), index % 3


class Permuting:
    """Mixes each sample with any other."""

    def __call__(self, inputs, targets):
        return (inputs + inputs[torch.randperm(len(inputs))]) / 2, targets


class EachItsOwn:
    """Draws for each place of the batch."""

    def __call__(self, inputs, targets):
        share = torch.rand(len(inputs), *[1] * (inputs.dim() - 1))
        return inputs * share + inputs.roll(1, 0) * (1 - share), targets


class Neighbours:
    """Mixes each sample with the one before it, in every second batch."""

    def __call__(self, inputs, targets):
        if torch.rand(()) < 0.5:
            return inputs, targets
        return (inputs + inputs.roll(1, 0)) / 2, targets


class Negating:
    """Writes into what it is given."""

    def __call__(self, inputs, targets):
        return inputs.neg_(), targets


MIXTURES = (Permuting, EachItsOwn, Neighbours, Negating)


class Ending(Observer):
    """Does something at the end of the first epoch."""

    def __init__(self, does):
        self.does = does

    def epoch_end(self, event):
        if event.position.epoch == 1:
            self.does()


class Scaling:
    """A collate function that reads a factor from a file."""

    def __init__(self, file):
        with open(file) as opened:
            self.factor = json.load(opened)

    def __call__(self, samples):
        batch = collate(samples)
        return replace(batch, inputs=batch.inputs * self.factor)


def padding(samples):
    inputs = nn.utils.rnn.pad_sequence([s.input for s in samples], batch_first=True)
    targets, index = (torch.tensor([getattr(s, name) for s in samples]) for name in FIELDS)
    return Batch(inputs, targets, index)


def run(folder, name, teacher=None, *, heard=None, train=None, **stage):
    """Run a stage whose teacher has a store; all of a folder share their stores."""
    file = folder / "teacher.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        save_file(ToyMLP(12).state_dict(), file)
    wide = teacher or {"type": "ToyMLP", "params": {"hidden": 12}, "checkpoint": str(file)}
    small = {"type": wide["type"]} if wide["type"] == "Padded" else {"type": "ToyMLP"}
    described = {
        "epochs": 2,
        "criterion": {"match": MATCH},
        "teacher": {"model": "wide", "store": EXACT},
        **stage,
    }
    train = train or {"type": "ToyData", "params": {"size": 20}}
    experiment = toy_experiment(
        folder / name,
        described,
        models={"mlp": small, "wide": wide},
        datasets={"train": train, "val": {"type": "ToyData", "params": {"size": 12}}},
        observers=["Ending"] if heard else [],
    )
    registry = toy_registry(
        models={each.__name__: each for each in (Scaled, Buffered, Masked, Padded)},
        losses={"OfTwo": OfTwo},
        datasets={"Sequences": Sequences, "WithGap": WithGap},
        collates={"Scaling": Scaling, "padding": lambda: padding},
        batch_transforms={each.__name__: each for each in MIXTURES},
        observers={"Ending": lambda: Ending(heard)},
    )
    return distill.run(
        experiment, registry=registry, runs=folder / name / "runs", stores=folder / "stores"
    )


def stores(folder):
    return sorted((folder / "stores").iterdir())


def test_a_file_that_the_model_reads_makes_a_miss(tmp_path):
    file = tmp_path / "factor.json"
    file.write_text("1.0")
    teacher = {"type": "Scaled", "params": {"file": str(file)}}
    for name in ("first", "same"):
        run(tmp_path, name, teacher)
    assert len(stores(tmp_path)) == 1
    file.write_text("2.0")
    run(tmp_path, "changed", teacher)
    assert len(stores(tmp_path)) == 2


def test_a_file_that_the_collate_function_reads_makes_a_miss(tmp_path):
    file = tmp_path / "factor.json"
    train = {
        "type": "ToyData",
        "params": {"size": 20},
        "collate": {"type": "Scaling", "params": {"file": str(file)}},
    }
    for content in ("1.0", "5.0"):
        file.write_text(content)
        run(tmp_path, f"with {content}", train=train)
    assert len(stores(tmp_path)) == 2


def test_a_buffer_that_no_checkpoint_holds_makes_a_miss(tmp_path, monkeypatch):
    teacher = {"type": "Buffered"}
    run(tmp_path, "first", teacher)
    monkeypatch.setattr(Buffered, "factor", 3.0)
    run(tmp_path, "changed", teacher)
    assert len(stores(tmp_path)) == 2


def test_other_code_of_distill_that_computes_outputs_makes_a_miss(tmp_path, monkeypatch):
    run(tmp_path, "first")
    monkeypatch.setattr("distill.training.store_identity.COMPUTES", ("distill.model.fast",))
    run(tmp_path, "changed")
    assert len(stores(tmp_path)) == 2


def damage(store):
    rows = open_rows(store)
    rows.rows[7, 3] ^= 16


def test_a_teacher_of_another_type_than_its_checkpoint_is_loaded_late(tmp_path):
    torch.manual_seed(0)
    state = {name: tensor.half() for name, tensor in ToyMLP(12).state_dict().items()}
    save_file(state, tmp_path / "teacher.safetensors")
    run(tmp_path, "first")
    (store,) = stores(tmp_path)
    run(tmp_path, "second", heard=lambda: damage(store))
    assert open_rows(store).damaged(numpy.arange(20)).tolist() == []


def test_a_teacher_loaded_late_from_a_changed_checkpoint_writes_nothing(tmp_path):
    run(tmp_path, "first")
    (store,) = stores(tmp_path)
    checkpoint = tmp_path / "teacher.safetensors"

    def change():
        state = load_file(checkpoint)
        save_file({name: 3 * tensor for name, tensor in state.items()}, checkpoint)
        damage(store)

    with pytest.raises(ConfigError, match="weights of 'wide' have changed since the stage began"):
        run(tmp_path, "second", heard=change)
    assert open_rows(store).damaged(numpy.arange(20)).tolist() == [7]


def test_samples_that_are_mixed_with_any_others_are_not_stored(tmp_path):
    data = {**DATA, "views": 1, "batch_transforms": ["Permuting"]}
    with pytest.raises(ConfigError, match="mix samples with others than those before them"):
        run(tmp_path, "first", data=data)


@pytest.mark.parametrize(("transform", "processes"), [("EachItsOwn", 1), ("Neighbours", None)])
def test_where_each_place_is_drawn_for_the_number_of_processes_counts(
    tmp_path, transform, processes
):
    run(tmp_path, "first", data={**DATA, "views": 1, "batch_transforms": [transform]})
    (store,) = stores(tmp_path)
    assert open_rows(store).meta["identity"]["mixed"]["processes"] == processes


@pytest.mark.parametrize("transforms", [["Negating"] * 9, ["Negating", "Neighbours"]])
def test_transforms_in_place_and_many_are_stored(tmp_path, transforms):
    train = {"type": "ToyData", "params": {"size": 40}}
    run(tmp_path, "first", train=train, data={**DATA, "views": 1, "batch_transforms": transforms})
    assert len(stores(tmp_path)) == 1


def test_samples_that_are_mixed_with_those_before_them_are_stored(tmp_path):
    both = ["Neighbours", "Neighbours"]
    data = {**DATA, "views": 1, "batch_transforms": both}
    run(tmp_path, "first", data=data)
    assert len(stores(tmp_path)) == 1


def test_an_input_that_is_not_finite_is_named_and_not_taken_for_mixed(tmp_path):
    data = {**DATA, "views": 1, "batch_transforms": ["Neighbours"]}
    with pytest.raises(NumericalError, match="the input of sample 2 is not finite"):
        run(tmp_path, "first", train={"type": "WithGap"}, data=data)


def test_a_teacher_that_leaves_classes_out_is_stored(tmp_path):
    run(tmp_path, "first", {"type": "Masked"}, criterion={"first": {"type": "OfTwo"}})
    assert len(stores(tmp_path)) == 1


def test_a_teacher_that_sees_how_long_the_others_are_is_refused(tmp_path):
    train = {"type": "Sequences", "collate": "padding"}
    with pytest.raises(DataError, match="depends on the other samples of the batch"):
        run(tmp_path, "first", {"type": "Padded"}, train=train, data=DATA)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A plugin with a package beside it, which it imports in a function only."""
    (tmp_path / "helping").mkdir()
    (tmp_path / "helping" / "act.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "another.py").write_text("import yaml\n")
    code = "class Model:\n    def forward(self):\n        from helping import act\n"
    (tmp_path / "plugged").mkdir()
    (tmp_path / "plugged" / "__init__.py").write_text(f"import another\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("plugged", "another"):
        sys.modules.pop(name, None)


def test_code_that_a_plugin_imports_counts(project):
    model = importlib.import_module("plugged").Model
    before = code_of([model])
    assert set(before) == {"plugged", "another", "helping", "yaml"}
    (project / "unrelated.py").write_text("pass\n")
    assert code_of([model]) == before
    (project / "helping" / "act.py").write_text("FACTOR = 3.0\n")
    assert code_of([model])["helping"] != before["helping"]
