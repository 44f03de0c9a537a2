"""Failures of models, losses and auxiliary modules, told where the file asks for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill.config.experiment import Experiment, Stage, Wired
from distill.config.yaml_document import Path, path_text
from distill.data.batch import Batch
from distill.data.source import Source
from distill.errors import ConfigError, DistillError
from distill.model.capture import CaptureError
from distill.model.controls import ControlError
from distill.model.wiring import CallError, describe, first_line, value_name
from distill.reference import STUDENT, each_reference
from distill.training.stage import Assembly

BYTES_NAMED = re.compile("Byte|unsigned char|uint8")
"""What errors of torch call the type of bytes."""
TO_FLOATS = "{type: ToDtype, params: {dtype: float32, scale: true}}"


def module_error(
    experiment: Experiment, assembly: Assembly, module: nn.Module, message: str
) -> ConfigError:
    """Return an error at the place where the file asks for a loss or auxiliary module."""
    stage = assembly.stage
    sections: list[tuple[Mapping[str, Wired], Mapping[str, nn.Module]]] = [
        (stage.auxiliary, assembly.auxiliary),
        (stage.criterion, assembly.terms),
        (stage.criterion, assembly.adapters),
    ]
    for described, modules in sections:
        for name, candidate in modules.items():
            if candidate is module:
                return experiment.error(described[name].component.path, message)
    assert assembly.distiller is not None
    for call in assembly.distiller.calls():  # it is a model's own
        if call.module is module:
            return experiment.error(stage.auxiliary[call.name].component.path, message)
    raise AssertionError("a module that failed belongs to its stage")


@contextmanager
def failures_told(experiment: Experiment, assembly: Assembly, batch: Batch) -> Iterator[None]:
    """Lay a failure of a loss, auxiliary module or control on a batch at its place in the file."""
    try:
        yield
    except ControlError as error:
        teacher = assembly.stage.teachers[error.role]
        raise experiment.error((*teacher.path, "control"), str(error)) from error
    except CallError as error:
        message = str(error) + _adapter_hint(assembly, error) + _views_hint(batch, error)
        raise module_error(experiment, assembly, error.module, message) from error


def _adapter_hint(assembly: Assembly, error: CallError) -> str:
    """Point to ``adapter: auto`` where a term compares features of different shapes."""
    name = next((n for n, term in assembly.terms.items() if term is error.module), None)
    if name is None or assembly.stage.criterion[name].adapter or not error.shapes_differ:
        return ""
    if "adapter: auto" in str(error):
        return ""
    if not isinstance(error.__cause__, (RuntimeError, ValueError, UserWarning)):
        return ""
    owners = {ref.owner for _, ref in each_reference(assembly.stage.criterion[name].inputs)}
    if STUDENT not in owners or not owners & assembly.stage.teachers.keys():
        return ""
    return "; 'adapter: auto' on the term brings the student's shapes to the teacher's"


def _views_hint(batch: Batch, error: CallError) -> str:
    """Say why a batch has more inputs than labels, if a module fails on the numbers of both."""
    if not isinstance(batch.inputs, torch.Tensor):
        return ""
    inputs, samples = len(batch.inputs), len(batch.index)
    named = re.findall(r"\d+", str(error.__cause__))
    if inputs == samples or not {str(inputs), str(samples)} <= set(named):
        return ""
    return (
        f"; each sample has {inputs // samples} views here, one behind the other, and a loss with "
        "labels takes the rows of one of them (SplitViews of distill-crd picks them)"
    )


@contextmanager
def model_failures_told(
    experiment: Experiment, assembly: Assembly, source: Source, role: str, batch: Batch
) -> Iterator[None]:
    try:
        yield
    except CaptureError as error:
        raise capture_error(experiment, assembly, role, error) from error
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except DistillError as error:
        raise experiment.error(_place_of(assembly.stage, role), str(error)) from error
    except Exception as error:  # the model is foreign code
        if _is_given_bytes(batch.inputs, error):
            raise _bytes_error(experiment, assembly, source, role, error) from error
        raise experiment.error(
            _place_of(assembly.stage, role),
            f"{type(assembly.model(role)).__name__} fails on data set '{source.name}' "
            f"(inputs {describe(batch.inputs)}): {first_line(error)}",
        ) from error


def _is_given_bytes(inputs: Any, error: Exception) -> bool:
    """Whether a model fails since images are still bytes, which torch then names in its ways.

    A model that makes floats of them itself, and fails on something else, is not meant.
    """
    is_bytes = isinstance(inputs, torch.Tensor) and inputs.dtype == torch.uint8
    return is_bytes and inputs.ndim >= 4 and bool(BYTES_NAMED.search(str(error)))


def _bytes_error(
    experiment: Experiment, assembly: Assembly, source: Source, role: str, error: Exception
) -> ConfigError:
    return experiment.error(
        ("datasets", source.name),
        f"its images are bytes (uint8), and {type(assembly.model(role)).__name__} of "
        f"{path_text(_place_of(assembly.stage, role), experiment.document.data)} takes floats "
        f"({first_line(error)}); end its transforms with {TO_FLOATS}",
    )


def _place_of(stage: Stage, role: str) -> Path:
    """Return where a stage names a model, which may be a peer of its student."""
    return stage.roles[role].path if role in stage.roles else stage.auxiliary[role].component.path


def capture_error(
    experiment: Experiment, assembly: Assembly, role: str, error: CaptureError
) -> ConfigError:
    """Return an error at a reference whose value cannot be captured."""
    place, text = _reference_to(assembly, value_name(role, error.path))
    return experiment.error(place, f"'{text}': {error}")


def _reference_to(assembly: Assembly, name: str) -> tuple[Path, str]:
    """Return where the file refers to a captured value, and how."""
    stage, distiller = assembly.stage, assembly.distiller
    assert distiller is not None
    texts = {a.text for call in distiller.calls() for a in call.addresses() if a.value == name}
    for part in (*stage.auxiliary.values(), *stage.criterion.values()):
        for key, ref in each_reference(part.inputs):
            if ref.text in texts:
                return (*part.component.path, "inputs", *key), ref.text
    raise AssertionError("only what a reference names is captured")
