"""Reference numbers for tests of losses: inputs, weights, and the loss and gradients expected.

A plugin's ``conftest.py`` has ::

    def pytest_generate_tests(metafunc):
        parametrize(metafunc, Path(__file__).parent / "golden")

A test module names its method, ``METHOD = "vid"``; a test that takes ``reference`` is run for every
case in ``golden/vid.json``, whose arrays are in ``golden/vid.npz``, in float64 and in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class Reference:
    """One case.

    Attributes:
        case: its entry in the JSON file.
        folder: where its arrays are.
        dtype: what is computed in.
        leaves: what was asked for by ``tensor`` and ``load``, by name.
    """

    case: dict[str, Any]
    folder: Path
    dtype: torch.dtype
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """Which form of the method it is of."""
        return str(self.case["variant"])

    @property
    def params(self) -> dict[str, Any]:
        """The method's parameters."""
        return dict(self.case["params"])

    def tensor(self, name: str) -> torch.Tensor:
        """Return an input, in the reference's type and with a gradient if it is of the student."""
        value = torch.from_numpy(self._array(f"in.{name}"))
        if value.is_floating_point():
            value = value.to(self.dtype)
            value.requires_grad_(name in self.case["expected"]["grads"])
        self.leaves[name] = value
        return value

    def state(self, module: str) -> dict[str, torch.Tensor]:
        """Return the weights of a module of the case, by name."""
        names = self.case["modules"][module]["state"]
        return {name: torch.from_numpy(self._array(f"mod.{module}.{name}")) for name in names}

    def load(self, module: str, target: nn.Module, names: dict[str, str] | None = None) -> None:
        """Give ``target`` the weights of a module; ``names`` maps the case's to the target's."""
        names = names or {}
        state = {names.get(name, name): value for name, value in self.state(module).items()}
        own = target.state_dict()
        unknown = state.keys() - own.keys()
        assert not unknown, f"{sorted(unknown)} are not among {sorted(own)}"
        target.to(self.dtype).load_state_dict(state, strict=False)
        parameters = dict(target.named_parameters())
        for name in self.state(module):
            if (parameter := parameters.get(names.get(name, name))) is not None:
                self.leaves[f"{module}.{name}"] = parameter

    def check(self, loss: torch.Tensor) -> None:
        """Compare the loss, and after its backward every gradient of the case."""
        expected, tolerance = self.case["expected"], self.case["tolerance"][self.type]
        assert loss.dtype == self.dtype
        assert abs(loss.item() - expected["loss"]) <= tolerance["loss"]
        loss.backward()
        assert expected["grads"], "a case without gradients checks little"
        for name, array in expected["grads"].items():
            leaf = self.leaves[name]
            assert leaf.grad is not None, f"{name} got no gradient"
            wanted = self._array(array.partition("/")[2])
            difference = np.abs(leaf.grad.numpy().reshape(wanted.shape) - wanted).max()
            assert difference <= tolerance["grad"], f"{name} is off by {difference}"

    @property
    def type(self) -> str:
        """The name of the type that is computed in."""
        return str(self.dtype).removeprefix("torch.")

    def _array(self, name: str) -> Any:
        with np.load(self.folder / self.case["file"], allow_pickle=False) as stored:
            return stored[f"{self.case['id']}/{name}"]


def parametrize(metafunc: Any, folder: Path) -> None:
    """Run a test that takes ``reference`` for every case of its module's ``METHOD``."""
    if "reference" not in metafunc.fixturenames:
        return
    stored = json.loads((folder / f"{metafunc.module.METHOD}.json").read_text("utf-8"))["cases"]
    dtypes = (torch.float64, torch.float32)
    references = [Reference(case, folder, dtype) for case in stored for dtype in dtypes]
    ids = [f"{reference.case['id']}-{reference.type}" for reference in references]
    metafunc.parametrize("reference", references, ids=ids)
