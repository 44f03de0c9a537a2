"""Shared by core's tests: toy parts instead of installed plugins, and an experiment of them."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from distill import plugins

torch.set_num_threads(1)

TOYS = Path(__file__).with_name("toy_plugin.py")

EXPERIMENT = """\
name: toy
seed: 3
device: cpu
log_every: 5
datasets:
  train: {type: Blobs, params: {size: 24}, transforms: [{type: Scale, params: {factor: 0.5}}]}
  val: {type: Blobs, params: {size: 12, seed: 1}}
models:
  wide: {type: MLP, params: {width: 16}}
  thin: {type: MLP, params: {width: 4}}
stages:
  - name: teach
    epochs: 2
    data: {train: train, validate: val, batch_size: 8}
    student: {model: wide}
    criterion:
      ce: {type: CrossEntropyLoss}
    optimizer: {type: SGD, params: {lr: 0.1}}
    scheduler: {type: StepLR, params: {step_size: 1}}
    precision: fp32
    metrics: [accuracy]
  - name: distil
    teacher: {model: wide, mode: eval}
    student: {model: thin}
    auxiliary:
      regressor:
        type: Linear
        params: {in_features: 4, out_features: 16}
        inputs: {input: student.hidden}
    freeze: [student.head]
    criterion:
      hint:
        type: MSELoss
        inputs: {input: regressor, target: teacher.hidden}
      kd: {type: Distance, weight: 0.5}
test: {dataset: val, metrics: [accuracy], baseline: teach}
observers:
  - type: Console
"""


@pytest.fixture(scope="session")
def toys() -> Path:
    """The plugin file of toy parts."""
    return TOYS


@pytest.fixture
def only_core(monkeypatch):
    """Let core's own plugin be the only one that is installed."""
    keep_core_alone(monkeypatch)


@pytest.fixture(scope="session")
def registry():
    """Core's parts and the toy parts, whatever else is installed."""
    with pytest.MonkeyPatch.context() as patch:
        keep_core_alone(patch)
        return plugins([TOYS])


@pytest.fixture
def experiment_text() -> str:
    """Two stages without a fault."""
    return EXPERIMENT


@pytest.fixture
def place():
    """Where a piece of text stands first: ``line:column``."""

    def find(text: str, piece: str) -> str:
        index = text.index(piece)
        return f"{text.count(chr(10), 0, index) + 1}:{index - text.rfind(chr(10), 0, index)}"

    return find


def keep_core_alone(patch: pytest.MonkeyPatch) -> None:
    """Hide every installed plugin but core's."""
    find = metadata.entry_points

    def found(**wanted: str) -> list[metadata.EntryPoint] | metadata.EntryPoints:
        points = find(**wanted)
        if wanted.get("group") != "distill":
            return points
        return [point for point in points if point.value == "distill.builtin"][:1]

    patch.setattr(metadata, "entry_points", found)
