"""Two samples through a whole stage before anything is trained: shapes, classes, gradients.

It runs in eval mode, so that no running statistics change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from distill.config.experiment import Experiment, Wired
from distill.data.batch import Batch
from distill.data.loader import Source, sample_batch
from distill.errors import ConfigError, DataError
from distill.model.distiller import Distiller, value_name
from distill.model.wiring import CallError, Values, describe, to_float32
from distill.training.stage import Assembly


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
    experiment: Experiment, assembly: Assembly, source: Source, seed: int, device: torch.device
) -> Rehearsal:
    """Run the stage on two samples.

    Raises:
        ConfigError: if a model, module or loss fails on what it is given, a loss is no scalar, or
            a term reaches nothing that trains.
        DataError: if a model's classes are not those of the data.
    """
    distiller = assembly.distiller
    assert distiller is not None
    batch = sample_batch(source, 2, seed).to(device)
    with _in_eval_mode(distiller):
        copied = []
        for role in distiller.models():
            _run_alone(experiment, assembly, source, role, batch)
            copied += _copy_overwritten(distiller, role)
        try:
            values = distiller.values(batch)
            _check_classes(experiment, assembly, source, values)
            losses = distiller.criterion(to_float32(values))
        except CallError as error:
            raise _at_module(experiment, assembly, error.module, str(error)) from error
    for name, module in assembly.terms.items():
        _check_term(experiment, assembly, module, losses[name])
    return Rehearsal(_leaves_unused(losses["total"], assembly.trainable()), tuple(copied))


@contextmanager
def _in_eval_mode(distiller: Distiller) -> Iterator[None]:
    """Put every module in eval mode, teachers that will train included, and back."""
    modes = {module: module.training for module in distiller.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run_alone(
    experiment: Experiment, assembly: Assembly, source: Source, role: str, batch: Batch
) -> None:
    """Call one model, so that a failure is laid at its door."""
    stage, distiller = assembly.stage, assembly.distiller
    assert distiller is not None
    try:
        with torch.no_grad():
            distiller.run_model(role, batch.inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        path = stage.student.path if role == "student" else stage.teachers[role].path
        raise experiment.error(
            path,
            f"{type(assembly.roles[role]).__name__} fails on data set '{source.name}' "
            f"(inputs {describe(batch.inputs)}): {str(error).strip().splitlines()[0]}",
        ) from error


def _copy_overwritten(distiller: Distiller, role: str) -> list[str]:
    """Have those values copied that the model has overwritten since they were captured."""
    capture = distiller.captures[role]
    overwritten = capture.overwritten()
    capture.cloned.update(overwritten)
    capture.clear()
    return [value_name(role, path) for path in overwritten]


def _check_classes(
    experiment: Experiment, assembly: Assembly, source: Source, values: Values
) -> None:
    """Refuse a model that is scored by accuracy but has another number of classes than the data."""
    stage = assembly.stage
    if source.classes is None or "accuracy" not in [metric.type for metric in stage.metrics]:
        return
    for role in assembly.roles:
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
        raise _at_module(experiment, assembly, module, message)
    if not loss.requires_grad:
        message = (
            f"in stage '{assembly.stage.name}' this term reaches no parameter that trains; "
            "wire it to the student or an auxiliary module, or free what is frozen"
        )
        raise _at_module(experiment, assembly, module, message)


def _at_module(
    experiment: Experiment, assembly: Assembly, module: nn.Module, message: str
) -> ConfigError:
    stage = assembly.stage
    sections: list[tuple[Mapping[str, Wired], Mapping[str, nn.Module]]] = [
        (stage.auxiliary, assembly.auxiliary),
        (stage.criterion, assembly.terms),
    ]
    for described, modules in sections:
        for name, candidate in modules.items():
            if candidate is module:
                return experiment.error(described[name].component.path, message)
    raise AssertionError("a module that failed belongs to its stage")


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
