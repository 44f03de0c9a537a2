"""A stage as one module: a Batch goes in, named losses come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distill.data.batch import Batch
from distill.model.capture import Capture
from distill.model.criterion import Criterion
from distill.model.wiring import Call, Values, to_float32


class Distiller(nn.Module):
    """Runs teachers and student on a batch, feeds auxiliary modules, and computes the criterion.

    Teachers run without gradients, in the mode they were put in; ``train()`` and ``eval()`` on the
    distiller do not reach them. Losses see float32 values whatever the models run in.

    Args:
        student: the model to train.
        teachers: role -> frozen model.
        auxiliary: calls in an order in which each one's arguments exist.
        criterion: the weighted terms.
        captures: role -> submodule paths whose values references ask for.
        autocast: device type and reduced precision for models and auxiliary modules, or ``None``.

    Attributes:
        captures: the recording of each model from which something is captured, by role.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        auxiliary: Sequence[Call],
        criterion: Criterion,
        captures: Mapping[str, Sequence[str]] | None = None,
        autocast: tuple[str, torch.dtype] | None = None,
    ):
        super().__init__()
        captures = captures or {}
        self.student = student
        self.teachers = nn.ModuleList(teachers.values())
        self.auxiliary = nn.ModuleList(call.module for call in auxiliary)
        self.criterion = criterion
        self._models = {"student": student, **teachers}  # a plain dict: registered above already
        self._teachers = tuple(teachers)
        self.captures = {
            role: Capture(self._models[role], paths) for role, paths in captures.items() if paths
        }
        for capture in self.captures.values():
            capture.enabled = False
        self._calls = tuple(auxiliary)
        self._autocast = autocast
        self._is_reduced = autocast is not None or any(
            parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.parameters()
        )

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the unweighted scalar of each term by name, and ``total``."""
        losses: dict[str, torch.Tensor] = self.criterion(self.values(batch))
        return losses

    def values(self, batch: Batch) -> Values:
        """Return what batch, models and auxiliary modules give, by name, in float32 for losses."""
        if not self._is_reduced:
            return self._values(batch)
        device_type, dtype = self._autocast or ("cpu", None)
        with torch.autocast(device_type, dtype, enabled=self._autocast is not None):
            return to_float32(self._values(batch))  # type: ignore[no-any-return]

    def _values(self, batch: Batch) -> Values:
        values: Values = {
            "inputs": batch.inputs,
            "targets": batch.targets,
            "index": batch.index,
            "extras": batch.extras,
        }
        with torch.no_grad():
            for role in self._teachers:
                self._run(values, role, batch)
        self._run(values, "student", batch)
        for call in self._calls:
            values[call.name] = call(values)
        return values

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of student, auxiliary modules and losses; teachers keep theirs."""
        self.training = mode
        for part in (self.student, self.auxiliary, self.criterion):
            part.train(mode)
        return self

    def models(self) -> dict[str, nn.Module]:
        """Return the student and the teachers by role."""
        return dict(self._models)

    def release(self) -> None:
        """Take all hooks off the models."""
        for capture in self.captures.values():
            capture.remove()

    def run_model(self, role: str, inputs: Any) -> Any:
        """Call one model with its capture recording, which at other times lets forwards pass."""
        capture = self.captures.get(role)
        if capture is None:
            return self._models[role](inputs)
        capture.clear()  # what a step that failed may have left
        capture.enabled = True
        try:
            return self._models[role](inputs)
        finally:
            capture.enabled = False

    def _run(self, values: Values, role: str, batch: Batch) -> None:
        values[role] = self.run_model(role, batch.inputs)
        if role in self.captures:
            for path, value in self.captures[role].pop().items():
                values[value_name(role, path)] = value


def value_name(role: str, path: str) -> str:
    """Return the name of a captured value: ``student.layer2``, ``teacher:input``."""
    return f"{role}{'' if not path or path.startswith(':') else '.'}{path}"
