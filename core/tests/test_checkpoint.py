import re

import pytest
import torch
from torch import nn

from distill import StorageError
from distill.builtin.torch_components import optimizers, schedulers
from distill.testing import ToyConvNet, ToyMLP
from distill.training import checkpoint
from distill.training.checkpoint import (
    load_state,
    load_weights,
    save_state,
    save_weights,
    write_atomically,
)

SCHEDULERS = {
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 3]},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 9},
    "StepLR": {"step_size": 1},
    "SWALR": {"swa_lr": 0.1},
}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def saved(tmp_path, module=None):
    file = tmp_path / "model.safetensors"
    save_weights((module or ToyMLP()).state_dict(), file)
    return file


def files_of(folder):
    return sorted(file.name for file in folder.iterdir())


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left) and len(left) == len(right)


def test_weights_come_back_bit_for_bit_into_the_plain_class(tmp_path):
    trained = ToyConvNet()
    trained.norm.running_mean.add_(0.5)
    other = ToyConvNet()
    load_weights(other, saved(tmp_path, trained))
    assert equal(other.state_dict(), trained.state_dict())
    assert files_of(tmp_path) == ["model.safetensors"]


def test_tied_weights_come_back_tied(tmp_path):
    trained, other = Tied(), Tied()
    load_weights(other, saved(tmp_path, trained))
    assert torch.equal(other.first.weight, trained.first.weight)
    assert other.second.weight is other.first.weight


def test_weights_of_any_memory_layout_can_be_written(tmp_path):
    trained, other = ToyConvNet(), ToyConvNet()
    trained.to(memory_format=torch.channels_last)
    trained.head.weight.data = torch.randn(4, 3).t()
    load_weights(other, saved(tmp_path, trained))
    assert equal(other.state_dict(), trained.state_dict())


def test_a_missing_file_is_told_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = f"there is no file gone.safetensors (looked in {tmp_path})"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_weights(ToyMLP(), checkpoint.Path("gone.safetensors"))


def test_other_formats_are_refused_unread(tmp_path):
    file = tmp_path / "model.pth"
    file.write_bytes(b"\x80\x04evil")
    with pytest.raises(ValueError, match=r"not a \.safetensors file; other formats can run code"):
        load_weights(ToyMLP(), file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: bytes(255 - byte for byte in content),
    ],
    ids=["truncated", "header cut", "empty", "zeros", "garbage"],
)
def test_a_damaged_file_is_an_error_with_its_name_and_changes_nothing(tmp_path, damage):
    file = saved(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    model = ToyMLP()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_weights(model, file)
    assert equal(model.state_dict(), before)


def test_another_architecture_lists_what_differs_and_changes_nothing(tmp_path):
    other = nn.Module()
    for name in ("a", "b", "c", "d"):
        other.register_parameter(name, nn.Parameter(torch.zeros(1)))
    other.head = nn.Linear(8, 5)
    model = ToyMLP()
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match="of another architecture than ToyMLP") as caught:
        load_weights(model, saved(tmp_path, other))
    text = str(caught.value)
    assert "lacks body.0.weight, body.0.bias" in text
    assert "has the unknown a, b, c and 1 more" in text
    assert "head.weight is (5, 8) instead of (3, 8)" in text
    assert torch.equal(model.head.weight, before)


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "state.pt"
    save_state(file, {"epoch": 1})

    def fail(temporary):
        temporary.write_bytes(b"half of it")
        raise RuntimeError("unexpected pos 768 vs 662")

    with pytest.raises(StorageError, match=r"state\.pt cannot be written: unexpected pos"):
        write_atomically(file, fail)
    assert load_state(file)["epoch"] == 1
    assert files_of(tmp_path) == ["state.pt"]


def test_a_rename_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = saved(tmp_path)
    before = file.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Path, "replace", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        save_weights(ToyMLP().state_dict(), file)
    assert file.read_bytes() == before
    assert files_of(tmp_path) == ["model.safetensors"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    file = tmp_path / "state.pt"
    save_state(file, {"epoch": 1})

    def write(temporary):
        temporary.write_bytes(b"half")
        assert load_state(file)["epoch"] == 1

    write_atomically(file, write)
    assert file.read_bytes() == b"half"


def test_what_a_killed_write_left_is_overwritten(tmp_path):
    (tmp_path / ".state.pt.tmp").write_bytes(b"left by a kill")
    save_state(tmp_path / "state.pt", {"epoch": 1})
    assert files_of(tmp_path) == ["state.pt"]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        save_state(tmp_path / "file" / "state.pt", {})


def test_state_of_tensors_and_plain_data_comes_back(tmp_path):
    file = tmp_path / "state.pt"
    state = {"epoch": 3, "best": {"accuracy": 0.5}, "w": torch.arange(3), "none": None, "l": [1]}
    save_state(file, state)
    loaded = load_state(file)
    assert torch.equal(loaded.pop("w"), state.pop("w"))
    assert loaded == {"format": checkpoint.FORMAT, **state}


@pytest.mark.parametrize(
    "content", [b"", b"garbage", bytes(500)], ids=["empty", "garbage", "zeros"]
)
def test_a_damaged_state_names_its_file_and_recommends_nothing_unsafe(tmp_path, content):
    file = tmp_path / "state.pt"
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"state\.pt is damaged") as caught:
        load_state(file)
    assert "weights_only" not in str(caught.value)


def test_a_truncated_state_is_told(tmp_path):
    file = tmp_path / "state.pt"
    save_state(file, {"w": torch.zeros(1000)})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"state\.pt is damaged"):
        load_state(file)


def test_a_state_that_holds_code_is_not_loaded(tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"format": checkpoint.FORMAT, "evil": ToyMLP()}, file)
    with pytest.raises(StorageError, match="damaged"):
        load_state(file)


def test_a_state_of_another_version_is_told(tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"format": 99}, file)
    with pytest.raises(StorageError, match=r"another version of distill \(format 99"):
        load_state(file)


@pytest.mark.parametrize("name", sorted(set(optimizers()) - {"SparseAdam"}))
def test_the_state_of_every_optimizer_comes_back(tmp_path, name):
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = optimizers()[name]([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    save_state(tmp_path / "state.pt", {"optimizer": optimizer.state_dict()})
    optimizer.load_state_dict(load_state(tmp_path / "state.pt")["optimizer"])


@pytest.mark.parametrize("name", sorted(schedulers()))
def test_the_state_of_every_scheduler_comes_back(tmp_path, name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = schedulers()[name](optimizer, **SCHEDULERS.get(name, {}))
    save_state(tmp_path / "state.pt", {"scheduler": scheduler.state_dict()})
    scheduler.load_state_dict(load_state(tmp_path / "state.pt")["scheduler"])
