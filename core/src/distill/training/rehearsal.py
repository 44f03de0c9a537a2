"""Two samples through a whole stage before anything is trained: shapes, classes, gradients.

It gives buffers back what they held, and random generators where they stood: it leaves no trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distill import randomness
from distill.config.experiment import Experiment, Stage
from distill.config.yaml_document import Path
from distill.data.batch import Batch
from distill.data.plan import Plan
from distill.data.source import Source
from distill.errors import ConfigError, DataError, DistillError
from distill.model.capture import CaptureError
from distill.model.criterion import TOTAL
from distill.model.distiller import call_model
from distill.model.stored import form_of
from distill.model.wiring import Values, describe, first_line, value_name
from distill.reference import STUDENT
from distill.training.around import special_module
from distill.training.build import Builder
from distill.training.failures import (
    capture_error,
    failures_told,
    model_failures_told,
    module_error,
)
from distill.training.freezing import freeze
from distill.training.metrics import Metric, compares_with, takes_teachers
from distill.training.set_up import set_up, set_up_when_called
from distill.training.stage import Assembly
from distill.training.teacher_store import TeacherStore
from distill.training.traceless import buffers_kept, in_eval_mode


@dataclass(frozen=True)
class Rehearsal:
    """What two samples tell about a stage.

    Attributes:
        unused: whether some trainable parameter gets no gradient.
        copied: references whose captured value has to be copied, since the model overwrites it.
        ran: for each model that is cut, how many of its parameters take part.
    """

    unused: bool
    copied: tuple[str, ...]
    ran: Mapping[str, int]


def rehearse(
    builder: Builder, assembly: Assembly, source: Source, plan: Plan, batch: Batch, seed: int
) -> Rehearsal:
    """Run the stage on two samples: first in whole, to set modules up, then as far as is needed.

    What the file freezes is frozen in between, and so are parameters of a student that nothing the
    stage computes comes from.

    Args:
        builder: of the experiment.
        assembly: the stage.
        source: its training data.
        plan: which has to have a batch.
        batch: two samples of it, as the models are given them.
        seed: of modules that find their shapes now.

    Raises:
        ConfigError: if a model, module or loss fails on what it is given, a loss is no scalar, or
            a term reaches nothing that trains.
        DataError: if a model's classes are not those of the data.
    """
    experiment, distiller = builder.experiment, assembly.distiller
    assert distiller is not None
    if plan.batches == 0:
        raise _no_batch(experiment, assembly.stage, source, plan)
    copied: list[str] = []
    _set_up_rows(experiment, assembly, source, batch, seed)
    with _as_in_training(assembly, batch), buffers_kept(distiller):
        for role, extent in distiller.extents.items():
            if extent != "nothing":
                _run_alone(experiment, assembly, source, role, batch)
                copied += _copy_overwritten(experiment, assembly, role)
        distiller.cut(batch)
    with _as_in_training(assembly, batch), failures_told(experiment, assembly, batch):
        set_up(distiller, assembly.parts, source, batch, seed)
    assembly.parts.restore()
    freeze(builder, assembly)
    with (
        _as_in_training(assembly, batch),
        buffers_kept(distiller),
        _called_modules() as called,
        failures_told(experiment, assembly, batch),
    ):
        values = distiller.values(batch)
        _check_classes(experiment, assembly, source, values)
        with _broadcasting_refused():
            losses = distiller.criterion.terms(values)
    for name, module in assembly.terms.items():
        _check_term(experiment, assembly, module, losses[name])
    unreached = _unreached(distiller.criterion.total(losses), assembly.trainable())
    _check_peers(experiment, assembly, unreached)
    if unreached and is_cut(assembly):
        unreached = _leave_out(assembly, unreached, batch)
    ran = {
        role: _parameters_called(model, distiller.runs(role), called)
        for role, model in distiller.models().items()
        if distiller.extents[role] == "part"
    }
    return Rehearsal(bool(unreached), tuple(copied), ran)


def is_cut(assembly: Assembly) -> bool:
    """Whether the stage asks less of the student, or of a peer, than there is."""
    distiller, stage = assembly.distiller, assembly.stage
    assert distiller is not None
    is_part = distiller.extents[STUDENT] != "whole"
    is_part |= any(distiller.parts_asked(peer) is not None for peer in stage.peers)
    return is_part or stage.student.redesign is not None


def _leave_out(
    assembly: Assembly, unreached: Sequence[nn.Parameter], batch: Batch
) -> list[nn.Parameter]:
    """Let the stage leave out those of the student's and peers' parameters that lead to nothing.

    In eval mode too, since a model may leave out other layers in train mode each time; none where
    it cannot be run so.

    Returns:
        The unreached parameters that are left.
    """
    distiller = assembly.distiller
    assert distiller is not None
    try:
        with in_eval_mode([distiller, *assembly.specials.values()]), buffers_kept(distiller):
            total = distiller(batch)[TOTAL]
    except Exception:  # foreign code, which need not give in eval mode what it gives in training
        return list(unreached)
    still = {id(parameter) for parameter in _unreached(total, unreached)}
    models = [assembly.model(name) for name in (STUDENT, *assembly.stage.peers)]
    of_models = {id(parameter) for model in models for parameter in model.parameters()}
    out = [p for p in unreached if id(p) in still & of_models]
    for parameter in out:
        parameter.requires_grad_(False)
    assembly.left_out = out
    return [p for p in unreached if p.requires_grad]


def rehearse_measuring(
    builder: Builder,
    assembly: Assembly,
    source: Source,
    batch: Batch,
    roles: Iterable[str],
    metrics: Mapping[str, Metric],
    place: Path,
) -> None:
    """Run two samples of data to measure on through models, as ``rehearse`` does for training.

    Args:
        builder: of the experiment.
        assembly: the stage.
        source: the data.
        batch: two samples of it.
        roles: whose models are measured.
        metrics: by name; those that compare with teachers are only shown the student.
        place: where the file asks for the data.

    Raises:
        ConfigError: if a model or a metric fails on them.
        DataError: if a model's classes are not those of the data.
    """
    experiment = builder.experiment
    outputs: dict[str, Any] = {}
    for role in roles:
        model, entry = assembly.model(role), assembly.stage.roles.get(role)
        special = special_module(builder, entry, model) if entry is not None else None
        with (
            in_eval_mode([model, *([special] if special else [])]),
            buffers_kept(model),
            torch.no_grad(),
            model_failures_told(experiment, assembly, source, role, batch),
        ):
            outputs[role] = call_model(model, special, batch)
        _check_classes(experiment, assembly, source, {role: outputs[role]})
    for role, output in outputs.items():
        for name, metric in metrics.items():
            try:
                _show(metric, output, batch, source, outputs if role == STUDENT else {})
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the metric is foreign code
                text = str(error) if isinstance(error, DistillError) else first_line(error)
                message = f"'{name}' cannot be measured on data set '{source.name}': {text}"
                raise experiment.error(place, message) from error


def rehearse_storing(
    builder: Builder, assembly: Assembly, stores: Mapping[str, TeacherStore], batch: Batch
) -> None:
    """See whether what teachers give for two samples has a form that their new stores can keep.

    Args:
        builder: of the experiment.
        assembly: the stage, rehearsed.
        stores: of its teachers by role.
        batch: two samples as its models are given them.

    Raises:
        DataError: if it has none.
    """
    experiment, distiller = builder.experiment, assembly.distiller
    assert distiller is not None
    for role, store in stores.items():
        kept = store.teacher.store
        if kept is None or role in assembly.absent or store.is_there:
            continue
        values = distiller.values_of_teacher(role, replace(batch, stored={}))
        try:
            form_of(values, store.addresses, role, len(batch), kept)
        except DataError as error:
            fault = experiment.fault((*store.teacher.path, "store"), str(error))
            raise DataError(str(fault)) from error


def _show(
    metric: Metric, output: Any, batch: Batch, source: Source, outputs: Mapping[str, Any]
) -> None:
    """Show a metric a batch, unless it compares with a teacher that is not there."""
    metric.reset()
    if hasattr(metric, "classes"):
        metric.classes = source.classes
    if not takes_teachers(metric):
        metric.update(output, batch)
    elif compares_with(metric) in outputs:
        metric.update(output, batch, teachers=outputs)  # type: ignore[call-arg]


@contextmanager
def _called_modules() -> Iterator[set[nn.Module]]:
    """Collect the modules that are called."""
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        yield called
    finally:
        handle.remove()


def _parameters_called(model: nn.Module, running: nn.Module, called: set[nn.Module]) -> int:
    """Return how many parameters the modules of a model have that are called in what runs of it."""
    paths = [path for path, module in running.named_modules() if module in called]
    own = (model.get_submodule(path).parameters(recurse=False) for path in paths)
    return sum(parameter.numel() for parameters in own for parameter in parameters)


@contextmanager
def _broadcasting_refused() -> Iterator[None]:
    """Make an error of torch's warning that a loss compares tensors of different shapes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a (target|input) size", UserWarning)
        yield


def _set_up_rows(
    experiment: Experiment, assembly: Assembly, source: Source, batch: Batch, seed: int
) -> None:
    """Let modules in a redesigned model's row find their shapes in a first forward of it."""
    distiller = assembly.distiller
    assert distiller is not None
    if not any(map(assembly.parts.is_unset, assembly.in_rows)):
        return
    with ExitStack() as stack:
        stack.enter_context(_as_in_training(assembly, batch))
        for model in assembly.roles.values():
            stack.enter_context(buffers_kept(model))
        stack.enter_context(set_up_when_called(assembly.in_rows, assembly.parts, seed))
        for role, extent in distiller.extents.items():
            if extent != "nothing":
                _run_alone(experiment, assembly, source, role, batch)


@contextmanager
def _as_in_training(assembly: Assembly, batch: Batch) -> Iterator[None]:
    """Put student, auxiliary modules and losses in train mode, in which some models give more.

    BatchNorm cannot train on a single sample; it is in eval mode for one.
    """
    distiller = assembly.distiller
    assert distiller is not None
    parts = [distiller, *assembly.specials.values()]
    modes = {module: module.training for part in parts for module in part.modules()}
    with randomness.torch_forked():
        distiller.train()
        for module in modes:
            if len(batch) < 2 and isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = False
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _no_batch(experiment: Experiment, stage: Stage, source: Source, plan: Plan) -> ConfigError:
    if plan.batch_sampler is not None:
        return experiment.error(stage.data.path, "the batch sampler gives no batch")
    return experiment.error(
        stage.data.path,
        f"data set '{source.name}' has {plan.samples} samples, less than one batch of "
        f"{plan.batch_size}, and drop_last leaves those out",
    )


def _run_alone(
    experiment: Experiment, assembly: Assembly, source: Source, role: str, batch: Batch
) -> None:
    """Call one model, so that a failure is laid at its door."""
    distiller = assembly.distiller
    assert distiller is not None
    with torch.no_grad(), model_failures_told(experiment, assembly, source, role, batch):
        distiller.run_model(role, batch)


def _copy_overwritten(experiment: Experiment, assembly: Assembly, role: str) -> list[str]:
    """Have those values copied that the model has overwritten since they were captured.

    Raises:
        ConfigError: if something to capture did not run.
    """
    assert assembly.distiller is not None
    capture = assembly.distiller.captures.get(role)
    if capture is None:
        return []
    overwritten = capture.overwritten()
    capture.cloned.update(overwritten)
    try:
        capture.check_complete()
    except CaptureError as error:
        raise capture_error(experiment, assembly, role, error) from error
    return [value_name(role, path) for path in overwritten]


def _check_classes(
    experiment: Experiment, assembly: Assembly, source: Source, values: Values
) -> None:
    """Refuse a model that is scored by accuracy but has another number of classes than the data."""
    stage = assembly.stage
    if source.classes is None or "accuracy" not in [
        metric.component.type for metric in stage.metrics
    ]:
        return
    named = {role: entry.model for role, entry in stage.roles.items()} | stage.measured_peers
    for role in named.keys() & values.keys():
        if role in stage.roles and stage.roles[role].redesign is not None:
            continue  # what is scored is the model's own output
        output = values[role]
        name = named[role]
        if not isinstance(output, torch.Tensor) or output.dim() != 2:
            continue
        if output.shape[1] != len(source.classes):
            path = (*experiment.models[name].component.path, "params", "num_classes")
            fault = experiment.fault(
                path,
                f"model '{name}' has {output.shape[1]} outputs, but data set '{source.name}' has "
                f"{len(source.classes)} classes",
            )
            raise DataError(str(fault))


def _check_term(
    experiment: Experiment, assembly: Assembly, module: nn.Module, loss: torch.Tensor
) -> None:
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        message = f"a loss must be a single number, this one gives {describe(loss)}"
        raise module_error(experiment, assembly, module, message)
    if not loss.requires_grad:
        message = (
            f"in stage '{assembly.stage.name}' this term reaches no parameter that trains; "
            "wire it to the student or an auxiliary module, or free what is frozen"
        )
        raise module_error(experiment, assembly, module, message)


def _check_peers(
    experiment: Experiment, assembly: Assembly, unreached: Iterable[nn.Parameter]
) -> None:
    """Refuse a model that is to be trained beside the student and that no term trains."""
    missed = {id(parameter) for parameter in unreached}
    for name, model in assembly.stage.peers.items():
        trainable = [p for p in assembly.auxiliary[name].parameters() if p.requires_grad]
        if trainable and all(id(parameter) in missed for parameter in trainable):
            message = (
                f"no term trains the model '{model}'; give a loss '{name}' where it takes the "
                f"student, as inputs: {{student: {name}}}, or make the model a teacher"
            )
            raise experiment.error(assembly.stage.auxiliary[name].component.path, message)


def _unreached(total: torch.Tensor, trainable: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the trainable parameters that the graph behind ``total`` misses."""
    reached: set[int] = set()
    seen, waiting = set(), [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return [parameter for parameter in trainable if id(parameter) not in reached]
