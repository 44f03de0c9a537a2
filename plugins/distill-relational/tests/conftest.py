"""Reference numbers for losses, with gradients, as fixtures.

A test module names its method, ``METHOD = "vid"``; a test that takes ``reference`` is run for every
stored case of that method, in float64 and in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Reference:
    """One case: inputs, weights, expected loss and gradients.

    Attributes:
        case: the entry of ``golden/<method>.json``.
        leaves: what was asked for by ``tensor``, by name.
    """

    case: dict[str, Any]
    dtype: torch.dtype
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return self.case["variant"]

    @property
    def params(self) -> dict[str, Any]:
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
        return {n: torch.from_numpy(self._array(f"mod.{module}.{n}")) for n in names}

    def load(
        self, module: str, target: torch.nn.Module, names: dict[str, str] | None = None
    ) -> None:
        """Give ``target`` the weights of a module; ``names`` maps the case's to the target's."""
        state = {(names or {}).get(n, n): value for n, value in self.state(module).items()}
        own = target.state_dict()
        unknown = state.keys() - own.keys()
        assert not unknown, f"{sorted(unknown)} are not among {sorted(own)}"
        target.to(self.dtype).load_state_dict(state, strict=False)
        parameters = dict(target.named_parameters())
        for name in self.state(module):
            self.leaves[f"{module}.{name}"] = parameters.get((names or {}).get(name, name))

    def check(self, loss: torch.Tensor) -> None:
        """Compare the loss, and after its backward every gradient of the case."""
        expected, tolerance = self.case["expected"], self.case["tolerance"][self._type]
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
    def _type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _array(self, name: str) -> np.ndarray:
        with np.load(GOLDEN / self.case["file"], allow_pickle=False) as stored:
            return stored[f"{self.case['id']}/{name}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "reference" not in metafunc.fixturenames:
        return
    stored = json.loads((GOLDEN / f"{metafunc.module.METHOD}.json").read_text())["cases"]
    dtypes = (torch.float64, torch.float32)
    references = [Reference(case, dtype) for case in stored for dtype in dtypes]
    ids = [f"{r.case['id']}-{r._type}" for r in references]
    metafunc.parametrize("reference", references, ids=ids)
