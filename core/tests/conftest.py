"""Shared by core's tests: toy parts instead of installed plugins, and an experiment of them."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import distributed, plugins
from distill.registry import Registry

torch.set_num_threads(1)

TOYS = Path(__file__).with_name("toy_plugin.py")

EXPERIMENT = """\
name: toy
seed: 3
device: cpu
log_every: 5
datasets:
  train: {type: ToyData, params: {size: 24}, transforms: [{type: Scale, params: {factor: 0.5}}]}
  val: {type: ToyData, params: {size: 12, seed: 1}}
models:
  wide: {type: ToyMLP, params: {hidden: 16}}
  thin: {type: ToyMLP, params: {hidden: 4}}
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
        inputs: {input: student.body}
    freeze: [student.head]
    criterion:
      hint:
        type: MSELoss
        inputs: {input: regressor, target: teacher.body}
      kd: {type: Distance, weight: 0.5}
test: {dataset: val, metrics: [accuracy], baseline: teach}
observers:
  - type: Console
"""


@pytest.fixture(scope="session")
def toys() -> Path:
    """The plugin file of toy parts."""
    return TOYS


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Core's parts and the toy parts, whatever else is installed."""
    with pytest.MonkeyPatch.context() as patch:
        _hide_installed_plugins(patch)
        return plugins([TOYS])


@pytest.fixture
def only_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let core's own plugin be the only one that is installed."""
    _hide_installed_plugins(monkeypatch)


@pytest.fixture
def experiment_text() -> str:
    """Two stages without a fault."""
    return EXPERIMENT


@pytest.fixture
def place() -> Callable[[str, str], str]:
    """Where a piece of text stands first: ``line:column``."""

    def find(text: str, piece: str) -> str:
        before = text[: text.index(piece)]
        return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"

    return find


@pytest.fixture
def every_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], list[Any]]:
    """Call something as every process of a world in turn: ``every_rank(world, read)``."""

    def call(world: int, read: Callable[[], Any]) -> list[Any]:
        results = []
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "world_size", lambda: world)
            for rank in range(world):
                patch.setattr(distributed, "rank", lambda rank=rank: rank)
                results.append(read())
        return results

    return call


def _hide_installed_plugins(patch: pytest.MonkeyPatch) -> None:
    find = metadata.entry_points

    def found(**wanted: str) -> object:
        points = find(**wanted)
        if wanted.get("group") != "distill":
            return points
        return [point for point in points if point.value == "distill.builtin"][:1]

    patch.setattr(metadata, "entry_points", found)
