"""Two samples through a whole stage before anything is trained: shapes, classes, gradients.

It gives buffers back what they held, and random generators where they stood: it leaves no trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from distill.config.experiment import Experiment, Stage
from distill.config.yaml_document import Path as ConfigPath
from distill.data.batch import Batch
from distill.data.plan import Plan
from distill.data.source import Source
from distill.errors import ConfigError, DataError, DistillError
from distill.model.capture import CaptureError
from distill.model.distiller import Distiller, value_name
from distill.model.wiring import CallError, Values, describe, first_line
from distill.training.stage import Assembly, module_error
from distill.training.traceless import buffers_kept, in_eval_mode


@dataclass(frozen=True)
class Rehearsal:
    """What two samples tell about a stage.

    Attributes:
        unused: whether some trainable parameter gets no gradient.
        copied: references whose captured value has to be copied, since the model overwrites it.
    """

    unused: bool
    copied: tuple[str, ...]


def rehearse(
    experiment: Experiment, assembly: Assembly, source: Source, plan: Plan, batch: Batch
) -> Rehearsal:
    """Run the stage on two samples.

    Args:
        experiment: the description.
        assembly: the stage.
        source: its training data.
        plan: which has to have a batch.
        batch: two samples of it, as the models are given them.

    Raises:
        ConfigError: if a model, module or loss fails on what it is given, a loss is no scalar, or
            a term reaches nothing that trains.
        DataError: if a model's classes are not those of the data.
    """
    distiller = assembly.distiller
    assert distiller is not None
    if plan.batches == 0:
        raise _no_batch(experiment, assembly.stage, source, plan)
    with _as_in_training(distiller, batch), buffers_kept(distiller):
        copied = []
        for role in distiller.models():
            copied += _run_alone(experiment, assembly, source, role, batch)
        try:
            values = distiller.values(batch)
            _check_classes(experiment, assembly, source, values)
            with _broadcasting_refused():
                losses = distiller.criterion.terms(values)
        except CallError as error:
            raise module_error(experiment, assembly, error.module, str(error)) from error
    for name, module in assembly.terms.items():
        _check_term(experiment, assembly, module, losses[name])
    total = distiller.criterion.total(losses)
    return Rehearsal(_leaves_unused(total, assembly.trainable()), tuple(copied))


def rehearse_measuring(
    experiment: Experiment,
    assembly: Assembly,
    source: Source,
    batch: Batch,
    roles: Iterable[str],
) -> None:
    """Run two samples of data to measure on through models, as ``rehearse`` does for training."""
    distiller = assembly.distiller
    assert distiller is not None
    with in_eval_mode([distiller]), buffers_kept(distiller), torch.no_grad():
        for role in roles:
            _run_alone(experiment, assembly, source, role, batch)
            output = distiller.run_model(role, batch.inputs)
            _check_classes(experiment, assembly, source, {role: output})


@contextmanager
def _broadcasting_refused() -> Iterator[None]:
    """Make an error of torch's warning that a loss compares tensors of different shapes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a (target|input) size", UserWarning)
        yield


@contextmanager
def _as_in_training(distiller: Distiller, batch: Batch) -> Iterator[None]:
    """Put student, auxiliary modules and losses in train mode, in which some models give more.

    A single sample, which BatchNorm cannot train on, is run in eval mode.
    """
    if len(batch) < 2:
        with in_eval_mode([distiller]):
            yield
        return
    modes = {module: module.training for module in distiller.modules()}
    with torch.random.fork_rng(enabled=batch.index.device.type != "meta"):
        distiller.train()
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
) -> list[str]:
    """Call one model, so that a failure is laid at its door; return what has to be copied."""
    stage, distiller = assembly.stage, assembly.distiller
    assert distiller is not None
    try:
        with torch.no_grad():
            distiller.run_model(role, batch.inputs)
        copied = _copy_overwritten(distiller, role)
    except CaptureError as error:
        place, text = _reference_to(stage, value_name(role, error.path))
        raise experiment.error(place, f"'{text}': {error}") from error
    except (torch.OutOfMemoryError, DistillError):
        raise
    except Exception as error:  # the model is foreign code
        path = stage.student.path if role == "student" else stage.teachers[role].path
        raise experiment.error(
            path,
            f"{type(assembly.roles[role]).__name__} fails on data set '{source.name}' "
            f"(inputs {describe(batch.inputs)}): {first_line(error)}",
        ) from error
    return copied


def _reference_to(stage: Stage, name: str) -> tuple[ConfigPath, str]:
    """Return where the file refers to a captured value, and how."""
    for part in (*stage.auxiliary.values(), *stage.criterion.values()):
        for key, ref in part.inputs.items():
            if ref.text == name or ref.text.startswith(f"{name}."):
                return (*part.component.path, "inputs", key), ref.text
    raise AssertionError("only what a reference names is captured")


def _copy_overwritten(distiller: Distiller, role: str) -> list[str]:
    """Have those values copied that the model has overwritten since they were captured.

    Raises:
        CaptureError: if something to capture did not run.
    """
    capture = distiller.captures.get(role)
    if capture is None:
        return []
    overwritten = capture.overwritten()
    capture.cloned.update(overwritten)
    capture.check_complete()
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
    for role in assembly.roles.keys() & values.keys():
        output = values[role]
        name = stage.student.model if role == "student" else stage.teachers[role].model
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


def _leaves_unused(total: torch.Tensor, trainable: Iterable[nn.Parameter]) -> bool:
    """Whether the graph behind ``total`` misses a trainable parameter."""
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
    return any(id(parameter) not in reached for parameter in trainable)
