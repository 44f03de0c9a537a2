"""A stage as one module: a Batch goes in, named losses come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from distill.data.batch import Batch
from distill.global_batch import shared_out
from distill.model.capture import Capture, CaptureError, Complete
from distill.model.controls import ControlError, OutputControl, controlled
from distill.model.criterion import Criterion
from distill.model.cutting import CutError, cut_branches
from distill.model.fast import FastTeacher
from distill.model.precision import Precision
from distill.model.stored import Outputs
from distill.model.wiring import Address, Call, CallError, Timer, Values, value_name
from distill.reference import STUDENT

Extent = Literal["whole", "part", "nothing"]
"""How much of a model a step runs: up to its output, up to the last captured value, or not at all.
"""


class Distiller(nn.Module):
    """Runs teachers and student on a batch, feeds auxiliary modules, and computes the criterion.

    Teachers run without gradients, in the mode they were put in; ``train()`` and ``eval()`` on the
    distiller do not reach them. Losses see float32 values whatever the models run in. A model whose
    output nothing asks for is stopped behind the last value that is asked of it, once ``cut`` has
    been called; one of which nothing is asked does not run.

    Args:
        student: the model to train.
        teachers: role -> frozen model; ``None`` for one that is not there, since what it gives is
            in a store.
        auxiliary: calls in an order in which each one's arguments exist.
        criterion: the weighted terms.
        captures: role, or name of an auxiliary call, -> submodule paths whose values references ask
            for.
        parameters: name of a value -> the module and the name of its parameter or buffer.
        specials: role -> the module around the model, called with the batch in its place.
        borrowed: names of auxiliary modules that are parts of a model, such as a teacher's head,
            whose mode they keep.
        whole: roles to be run in whole whatever is asked of them.
        autocast: device type and reduced precision for models and auxiliary modules, or ``None``.
        controls: role of a teacher -> what stands in for its output.

    Attributes:
        captures: the recording of each model from which something is captured, by role.
        extents: how much of each model a step runs, by role.
        uncut: role -> why a model runs to its end though nothing behind is asked for.
        branches: role -> parts of the model that lead to nothing asked of it, and do not run.
        untraced: role -> why such parts, if there are any, could not be found.
        fast: what runs in a teacher's place, by role.
        timer: what parts of a step are called through while they are timed.
        stores: role -> where what a teacher gives is kept.
        absent: role -> how to get a teacher that is not there after all; it calls ``adopt``.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module | None],
        auxiliary: Sequence[Call],
        criterion: Criterion,
        captures: Mapping[str, Sequence[str]] | None = None,
        parameters: Mapping[str, tuple[nn.Module, str]] | None = None,
        specials: Mapping[str, nn.Module] | None = None,
        borrowed: Iterable[str] = (),
        whole: Iterable[str] = (),
        autocast: tuple[str, torch.dtype] | None = None,
        controls: Mapping[str, OutputControl] | None = None,
    ):
        super().__init__()
        self.student = student
        present = {role: model for role, model in teachers.items() if model is not None}
        self.teachers = nn.ModuleList(present.values())
        # Plain dicts and tuples: what is in them is registered already, or belongs to a model.
        self._models = {STUDENT: student, **present}
        captured = {**{call.name: call.module for call in auxiliary}, **self._models}
        self._teachers = tuple(teachers)
        borrowed = set(borrowed)
        own = [call.module for call in auxiliary if call.name not in borrowed]
        self.auxiliary = nn.ModuleList(own)
        self.criterion = criterion
        self.captures = {
            # What an auxiliary call overwrites is not looked for, so its values are copied.
            role: Capture(captured[role], paths, clone=role not in self._models)
            for role, paths in (captures or {}).items()
            if paths and role in captured
        }
        self._paths = dict(captures or {})
        for capture in self.captures.values():
            capture.enabled = False
        self._calls = tuple(auxiliary)
        self._tensors_asked = dict(parameters or {})
        self._specials = dict(specials or {})
        self._held: tuple[nn.Module, ...] = ()
        self._precision = Precision(autocast, self.parameters())
        self._controls = dict(controls or {})
        self._whole = frozenset(whole)
        self.extents = {role: self._extent(role) for role in self._models}
        self.extents.update({role: "nothing" for role in teachers if role not in present})
        self._pruned: dict[str, nn.Module] = {}
        self.uncut: dict[str, str] = {}
        self.branches: dict[str, tuple[str, ...]] = {}
        self.untraced: dict[str, str] = {}
        # In a plain dict: DDP and whoever asks for parameters is to see the teachers themselves.
        self.fast: dict[str, FastTeacher] = {}
        self.timer: Timer | None = None
        self.stores: dict[str, Outputs] = {}
        self.absent: dict[str, Callable[[], None]] = {}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the unweighted scalar of each term by name, and ``total``."""
        if len(batch.sizes) < 2:
            return self._losses(batch)
        with shared_out(batch.sizes):
            return self._losses(batch)

    def _losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        losses: dict[str, torch.Tensor] = self.criterion(self.values(batch))
        return losses

    def values(self, batch: Batch) -> Values:
        """Return what batch, models and auxiliary modules give, by name, in float32 for losses."""

        def values() -> Values:
            of_models = self._of_models(batch)
            if self.timer is not None:
                self._timed_auxiliaries(self.timer, of_models)
                return of_models
            for call in self._calls:
                self.run_auxiliary(call, of_models)
            return of_models

        return self._precision(values)

    def values_of_models(self, batch: Batch) -> Values:
        """Return what there is before auxiliary modules: what batch and models give, by name."""
        return self._precision(lambda: self._of_models(batch))

    def fill_stores(self, batch: Batch) -> None:
        """Put what is missing of a batch into the stores; nothing but teachers runs."""
        values: Values = {}

        def stored() -> Values:
            for role, found in batch.stored.items():
                if found.missing is not None:
                    self._run(values, role, batch)
            return values

        with torch.no_grad():
            self._precision(stored)

    def flush_stores(self) -> None:
        """Write to the stores what is still on its way there."""
        for outputs in self.stores.values():
            outputs.flush()

    def values_of_teacher(self, role: str, batch: Batch) -> Values:
        """Return what one teacher gives for a batch, by name, whatever is stored of it."""
        values: Values = {}

        def computed() -> Values:
            self._compute(values, role, batch)
            return values

        with torch.no_grad():
            return self._precision(computed)

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of student, auxiliary modules and losses; teachers keep theirs."""
        self.training = mode
        around = [self._specials[STUDENT]] if STUDENT in self._specials else []
        for part in (self.student, *around, self.auxiliary, self.criterion):
            part.train(mode)
        for module in self._held:
            module.training = False
        return self

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Keep modules in eval mode while others train."""
        self._held = tuple(modules)

    def models(self) -> dict[str, nn.Module]:
        """Return the student and the teachers by role."""
        return dict(self._models)

    def runs(self, role: str) -> nn.Module:
        """Return the model that runs in a role, which for a fast teacher is a copy."""
        return self.fast[role].model if role in self.fast else self._models[role]

    def run_fast(self, role: str, make: Callable[[nn.Module], FastTeacher | None]) -> None:
        """Let what ``make`` makes of a teacher run in its place; if that is nothing, it stays.

        To be called before ``cut``.
        """
        capture = self.captures.get(role)
        if capture is not None:
            capture.remove()  # whose hooks a copy of the model would have too
        fast = make(self._models[role])
        if fast is not None:
            self.fast[role] = fast
        if capture is not None:
            self.captures[role] = Capture(self.runs(role), capture.paths, clone=capture.cloned)
            self.captures[role].enabled = False

    def adopt(self, role: str, model: nn.Module, special: nn.Module | None) -> None:
        """Take in a teacher that was not there."""
        self._models[role] = model
        if special is not None:
            self._specials[role] = special
        if self._paths.get(role):
            self.captures[role] = Capture(model, self._paths[role], clone=True)
            self.captures[role].enabled = False
        self.extents[role] = self._extent(role)

    def addresses_of(self, role: str) -> list[Address]:
        """Return what a step reads of a model's output and of what is captured in it."""
        paths = self._paths.get(role, ())
        names = {role, *(value_name(role, path) for path in paths)}
        addresses = (address for call in self.calls() for address in call.addresses())
        return list({a.text: a for a in addresses if a.value in names}.values())

    def owners_of_tensors(self) -> set[str]:
        """Return of which models parameters or buffers are asked for."""
        return {name.partition(".")[0] for name in self._tensors_asked}

    def calls(self) -> list[Call]:
        """Return the calls of auxiliary modules and of losses, in order."""
        return [*self._calls, *self.criterion.calls]

    def cut(self, batch: Batch) -> None:
        """Leave out from now on what nothing asks for.

        To be called after a whole forward of each model on ``batch``, still captured, in the mode
        that it is trained in.
        """
        for role, extent in self.extents.items():
            if extent == "part" and not self.captures[role].stop_early():
                self.uncut[role] = "only its end tells which call is the last"
            if extent != "nothing" and role not in self._whole:
                self._prune(role, batch)

    def run_auxiliary(self, call: Call, values: Values) -> None:
        """Call an auxiliary module on values, and put there what it gives.

        Raises:
            CallError: as a call, or if something to capture in it did not run.
        """
        capture = self.captures.get(call.name)
        if capture is None:
            values[call.name] = call(values)
            return
        capture.clear()
        capture.enabled = True
        try:
            values[call.name] = call(values)
            found = capture.pop()
        except CaptureError as error:
            text = f"'{value_name(call.name, error.path)}': {error}"
            raise CallError(call.module, text) from error
        finally:
            capture.enabled = False
        values.update({value_name(call.name, path): value for path, value in found.items()})

    def release(self) -> None:
        """Take all hooks off the models."""
        for capture in self.captures.values():
            capture.remove()

    def run_model(self, role: str, batch: Batch) -> Any:
        """Call one model with its capture recording; ``None`` if it stops before its output.

        At other times forwards of the model pass its capture unrecorded.
        """
        capture = self.captures.get(role)
        if capture is None:
            return self._call(role, batch)
        capture.clear()  # what a step that failed may have left
        capture.enabled = True
        try:
            return self._call(role, batch)
        except Complete:
            return None
        finally:
            capture.enabled = False

    def _call(self, role: str, batch: Batch) -> Any:
        if role in self.fast:
            return self.fast[role](batch, self._pruned.get(role))
        model = self._pruned.get(role, self._models[role])
        return call_model(model, self._specials.get(role), batch)

    def _extent(self, role: str) -> Extent:
        if self.parts_asked(role) == [] and role not in self.captures:
            return "nothing"
        return "whole" if role in self._whole or self.parts_asked(role) != [] else "part"

    def parts_asked(self, role: str) -> list[str] | None:
        """Return which parts of a model's output are asked for, ``None`` for all of it."""
        addresses = [a for call in self.calls() for a in call.addresses() if a.value == role]
        if any(not address.keys for address in addresses):
            return None
        return sorted({address.keys[0] for address in addresses})

    def _prune(self, role: str, batch: Batch) -> None:
        """Leave out a model's side branches if what it gives without them is the same."""
        parts = self.parts_asked(role)
        is_other_mode = role == STUDENT and not self.training
        if parts is None or role in self._specials or is_other_mode:
            return
        paths = self.captures[role].paths if role in self.captures else ()
        try:
            pruned = cut_branches(self.runs(role), paths, parts, partial(self._gives, role, batch))
        except CutError as error:
            self.untraced[role] = str(error)
            return
        if pruned is not None:
            self._pruned[role] = pruned.module
            self.branches[role] = pruned.left_out

    def _gives(self, role: str, batch: Batch, pruned: nn.Module | None) -> Values:
        """Return what a step reads of a model, or of another form of it in its place."""
        values: Values = {}
        if pruned is not None:
            self._pruned[role] = pruned
        try:
            self._run(values, role, batch)
        finally:
            self._pruned.pop(role, None)
        addresses = [address for call in self.calls() for address in call.addresses()]
        return {a.text: a.read(values) for a in addresses if a.value in values}

    def _of_models(self, batch: Batch) -> Values:
        values: Values = {
            "inputs": batch.inputs,
            "targets": batch.targets,
            "index": batch.index,
            "extras": batch.extras,
        }
        run = self._run if self.timer is None else partial(self._timed_run, self.timer)
        with torch.no_grad():
            for role in self._teachers:
                run(values, role, batch)
        run(values, STUDENT, batch)
        for name, (module, attribute) in self._tensors_asked.items():
            values[name] = getattr(module, attribute)
        return values

    def _run(self, values: Values, role: str, batch: Batch) -> None:
        stored = batch.stored.get(role)
        if stored is None:
            self._compute(values, role, batch)
        elif stored.missing is None:
            values.update(self.stores[role].values(stored))
        else:
            if role not in self._models:
                self.absent[role]()
            computed: Values = {}
            self._compute(computed, role, batch)
            values.update(self.stores[role].keep(stored, computed))
        if role in self._controls and role in values:
            values[role] = self._controlled(role, values[role], batch)

    def _compute(self, values: Values, role: str, batch: Batch) -> None:
        extent = self.extents[role]
        if extent == "nothing":
            return
        output = self.run_model(role, batch)
        captured = self.captures[role].pop() if role in self.captures else {}
        if role in self.fast:
            output, captured = self.fast[role].back((output, captured))
        if extent == "whole":
            values[role] = output
        for path, value in captured.items():
            values[value_name(role, path)] = value

    def _timed_run(self, timer: Timer, values: Values, role: str, batch: Batch) -> None:
        kind = "student" if role == STUDENT else "teacher"
        timer(kind, role, lambda: self._run(values, role, batch))

    def _timed_auxiliaries(self, timer: Timer, values: Values) -> None:
        for call in self._calls:
            timer("auxiliary", call.name, partial(self.run_auxiliary, call, values))

    def _controlled(self, role: str, output: Any, batch: Batch) -> Any:
        try:
            return controlled(self._controls[role], output, batch.targets)
        except ControlError as error:
            error.role = role
            raise


def call_model(model: nn.Module, special: nn.Module | None, batch: Batch) -> Any:
    """Call a model on a batch, by the special module around it if there is one."""
    return model(batch.inputs) if special is None else special(batch)
