"""Teachers in a faster form: made of a stage's frozen ones, and how far they are from those."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distill import distributed, randomness
from distill.config.experiment import Stage, Teacher
from distill.config.teaching import Fast
from distill.data.batch import Batch
from distill.data.loader import training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.errors import ConfigError
from distill.model.distiller import call_model
from distill.model.fast import (
    FastTeacher,
    Pair,
    cast,
    fold,
    foldable,
    is_finite,
    relative_error,
    values_read,
)
from distill.model.wiring import Address, first_line
from distill.training.around import special_module
from distill.training.build import Builder
from distill.training.note import Note, counted
from distill.training.seed_run import SeedRun, memory_format
from distill.training.stage import REDUCED, Assembly
from distill.training.traceless import buffers_kept

SAMPLES = 64
"""So many training samples a fast teacher is compared with the plain one on."""
FOLDED_ERROR = 1e-4
"""What folding may change in float32, relative to the largest value."""


def make_fast(run: SeedRun, assembly: Assembly, batch: Batch) -> None:
    """Let the fast form of each teacher run that is to have one.

    To be called once roles are in force, before anything is rehearsed. A teacher of which nothing
    is asked, or that fails as it is (of which the rehearsal tells), stays what it is.

    Args:
        run: of which the stage is.
        assembly: the stage.
        batch: two samples as its models are given them.

    Raises:
        ConfigError: if a device is not there, a model cannot be copied, or fails in its fast form.
    """
    distiller = assembly.distiller
    assert distiller is not None
    for role, teacher in assembly.stage.teachers.items():
        is_made = role in distiller.fast
        if teacher.fast is None or is_made or distiller.extents[role] == "nothing":
            continue
        addresses = distiller.addresses_of(role)
        maker = _Maker(run.builder, assembly, role, teacher, teacher.fast, addresses, batch)
        distiller.run_fast(role, maker.make)
        special = distiller.fast[role].special if role in distiller.fast else None
        if special is not None:
            assembly.specials[role] = special


def compiled_teachers(assembly: Assembly) -> list[nn.Module]:
    """Return the fast teachers that torch is to compile."""
    assert assembly.distiller is not None
    teachers = assembly.stage.teachers
    return [
        form.model
        for role, form in assembly.distiller.fast.items()
        if (asked := teachers[role].fast) is not None and asked.compile
    ]


@dataclass(frozen=True)
class _Maker:
    """Makes the fast form of one teacher."""

    builder: Builder
    assembly: Assembly
    role: str
    teacher: Teacher
    fast: Fast
    addresses: Sequence[Address]
    batch: Batch

    def make(self, plain: nn.Module) -> FastTeacher | None:
        home = self.batch.index.device
        device = self._device(home)
        special = self.assembly.specials.get(self.role)
        try:
            with _traceless(plain):
                before = self._read(plain, lambda: call_model(plain, special, self.batch))
        except Exception:  # foreign code, whose failure the rehearsal tells
            return None
        form = self._copy(plain, home)
        if self.fast.fold_batchnorm:
            form = self._folded(form, before)
        cast_to = REDUCED.get(self.fast.precision)
        if cast_to is not None:
            cast(form.model, cast_to)
        if self.fast.channels_last:
            form.model.to(memory_format=torch.channels_last)
        form.model.to(device)
        form = replace(form, device=device, dtype=cast_to)
        self._try(form)
        return form

    def _copy(self, plain: nn.Module, home: torch.device) -> FastTeacher:
        try:
            model = copy.deepcopy(plain).eval().requires_grad_(False)
        except Exception as error:  # foreign code, which may hold what cannot be copied
            message = f"{type(plain).__name__} cannot be copied: {first_line(error)}"
            raise self._error(message) from error
        special = special_module(self.builder, self.teacher, model)
        if special is not None:
            special.eval()
        return FastTeacher(model, special, home, home, channels_last=self.fast.channels_last)

    def _folded(self, form: FastTeacher, before: Mapping[str, Any]) -> FastTeacher:
        """Fold what can be, unless what is read of the teacher is another then."""

        def call() -> Any:
            return call_model(form.model, form.special, self.batch)

        paths = self._paths()
        with _traceless(form.model):
            pairs, ran = foldable(form.model, call, paths)
        if not pairs:
            return replace(form, batchnorms=ran)
        undo = fold(form.model, pairs)
        with _traceless(form.model):
            error = relative_error(before, self._read(form.model, call))
        if error <= FOLDED_ERROR:
            return replace(form, batchnorms=ran, folded=len(pairs))
        undo()
        return replace(form, batchnorms=ran, refused=_refused(pairs, error))

    def _try(self, form: FastTeacher) -> None:
        """Run it once, so that what it cannot do is told at the key that asks for it."""
        try:
            with _traceless(form.model):
                self._read(form.model, lambda: form(self.batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model is foreign code
            asked: list[str] = [self.fast.precision] if self.fast.precision in REDUCED else []
            asked += ["channels last"] if self.fast.channels_last else []
            how = " and ".join(asked) or "its fast form"
            message = (
                f"{type(form.model).__name__} does not run in {how} on {form.device}: "
                f"{first_line(error)}"
            )
            raise self._error(message) from error

    def _paths(self) -> tuple[str, ...]:
        distiller = self.assembly.distiller
        assert distiller is not None
        capture = distiller.captures.get(self.role)
        return capture.paths if capture is not None else ()

    def _read(self, model: nn.Module, call: Any) -> dict[str, Any]:
        return values_read(model, call, self.role, self.addresses)

    def _device(self, home: torch.device) -> torch.device:
        name = self.fast.device
        if name in (None, "auto", home.type):
            return home
        device = torch.device(name)
        there = {"cpu": 1, "cuda": torch.cuda.device_count()}
        there["mps"] = int(torch.backends.mps.is_available())
        if (device.index or 0) >= there[device.type]:
            message = f"{name} was asked for, and torch sees {there[device.type]} of them here"
            path = (*self.teacher.path, "fast", "device")
            raise self.builder.experiment.error(path, message)
        return device

    def _error(self, message: str) -> ConfigError:
        return self.builder.experiment.error((*self.teacher.path, "fast"), message)


def _refused(pairs: Sequence[Pair], error: float) -> str:
    return f"the {len(pairs)} that could be would change what is read of it by {error:.2g}"


@contextmanager
def _traceless(model: nn.Module) -> Iterator[None]:
    """Let forwards leave no trace, and convolutions compute in float32 as it is."""
    exact: AbstractContextManager[None] = nullcontext()
    if any(parameter.is_cuda for parameter in model.parameters()):
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(enabled=cudnn.enabled, allow_tf32=False)
    with randomness.torch_forked(), buffers_kept(model), exact:
        yield


def fast_notes(run: SeedRun, assembly: Assembly, source: Source, plan: Plan) -> list[str]:
    """Say of each fast teacher how far what a stage reads of it is from what the plain one gives.

    On the first training samples of the stage, in the main process: of logits (B, C) the mean
    KL(plain || fast) of their softmax at temperature 1 and how often the largest is the same; of
    anything else the largest difference over the largest magnitude.
    """
    distiller, stage = assembly.distiller, assembly.stage
    assert distiller is not None
    if not distiller.fast or not distributed.is_main():
        return []
    found = {role: _Distance() for role in distiller.fast}
    samples = 0
    for batch in _first_batches(run, stage, source, plan):
        samples += len(batch)
        for role, form in distiller.fast.items():
            plain, addresses = distiller.models()[role], distiller.addresses_of(role)
            special = special_module(run.builder, stage.roles[role], plain)
            if special is not None:
                special.eval()
            with randomness.torch_forked(), buffers_kept(plain), buffers_kept(form.model):
                call = partial(call_model, plain, special, batch)
                before = values_read(plain, call, role, addresses)
                now = values_read(form.model, partial(form, batch), role, addresses)
            logits = [a.text for a in addresses if a.value == role]
            found[role].add(before, form.back(now), logits)
    return [
        line
        for role, form in distiller.fast.items()
        for line in _lines(role, form, stage.teachers[role].fast, found[role], samples)
    ]


def _first_batches(run: SeedRun, stage: Stage, source: Source, plan: Plan) -> Iterator[Batch]:
    """Yield batches of the first epoch until there are enough samples."""
    short = replace(plan, batch_size=min(SAMPLES, plan.batch_size), accumulate=1, drop_last=False)
    loading = replace(run.loading(stage), workers=0, pin_memory=False)
    samples = 0
    for batch in training_batches(source, short, loading, seed=run.seed, epoch=0):
        yield batch.to(run.device, memory_format=memory_format(stage))
        samples += len(batch)
        if samples >= SAMPLES:
            return


@dataclass
class _Distance:
    """How far values are from others, over batches.

    Attributes:
        divergence: sum of the KL divergences of logits, by reference.
        same: samples whose largest logit is the same, by reference.
        rows: logits' rows, by reference.
        errors: relative errors of everything else, by reference.
        is_finite: whether all values are that are so otherwise.
    """

    divergence: dict[str, float] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    is_finite: bool = True

    def add(
        self, plain: Mapping[str, Any], fast: Mapping[str, Any], outputs: Collection[str]
    ) -> None:
        """Compare the values of a batch, by reference; ``outputs`` may be logits."""
        for name, before in plain.items():
            now = fast[name]
            self.is_finite &= is_finite(now) or not is_finite(before)
            if name in outputs and isinstance(before, torch.Tensor) and before.dim() == 2:
                self._add_logits(name, before, now)
            else:
                error = relative_error(before, now)
                self.errors[name] = max(self.errors.get(name, 0.0), error)

    def _add_logits(self, name: str, before: torch.Tensor, now: torch.Tensor) -> None:
        before, now = before.cpu().double(), now.cpu().double()
        of_plain, of_fast = F.log_softmax(before, 1), F.log_softmax(now, 1)
        kl = F.kl_div(of_fast, of_plain, reduction="sum", log_target=True)
        self.divergence[name] = self.divergence.get(name, 0.0) + float(kl)
        same = int((before.argmax(1) == now.argmax(1)).sum())
        self.same[name] = self.same.get(name, 0) + same
        self.rows[name] = self.rows.get(name, 0) + len(before)

    def texts(self) -> list[str]:
        """Return what there is to say, by reference."""
        logits = [
            f"{name} is KL {self.divergence[name] / rows:.2g} from the plain one, with the same "
            f"top-1 for {100 * self.same[name] / rows:.1f} %"
            for name, rows in self.rows.items()
        ]
        return [*logits, *(f"{name} is off by at most {e:.2g}" for name, e in self.errors.items())]


def _lines(
    role: str, form: FastTeacher, asked: Fast | None, distance: _Distance, samples: int
) -> Iterator[str]:
    assert asked is not None
    how = [f"{form.folded} of {form.batchnorms} BatchNorms folded"] if asked.fold_batchnorm else []
    how += ["channels last"] if asked.channels_last else []
    how += [asked.precision] if asked.precision in REDUCED else []
    how += ["compiled"] if asked.compile else []
    how += [f"on {form.device}"] if form.device != form.home else []
    found = "; ".join(distance.texts())
    on = counted(samples, "training sample")
    yield Note(f"{role} is fast ({', '.join(how) or 'a copy'}): on {on} {found}", "fast")
    if form.refused:
        yield f"no BatchNorm of {role} is folded: {form.refused}"
    if not distance.is_finite:
        yield (
            f"warning: in {asked.precision} what {role} gives is not finite, as it is otherwise; "
            "fast: {precision: bf16} has the range of fp32"
        )
