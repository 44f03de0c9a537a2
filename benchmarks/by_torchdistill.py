"""The same steps by torchdistill, where it is installed (pip install torchdistill)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from distill.data.batch import Batch


def is_installed() -> bool:
    """Whether there is anything to compare with."""
    return find_spec("torchdistill") is not None


def by_torchdistill(
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    temperature: float,
    alpha: float,
    hooked: Sequence[str] = (),
) -> Callable[[list[Batch]], None]:
    """Return a function that trains on batches as torchdistill's examples do.

    Args:
        teacher: frozen.
        student: trained by SGD.
        device: where both are.
        temperature: of KD.
        alpha: the labels' part in KD.
        hooked: layers of both that are compared by their mean squares too.
    """
    from torchdistill.core.distillation import DistillationBox

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    taps: dict[str, Any] = {"input": [], "output": list(hooked)}
    model = {"forward_proc": "forward_batch_only", "forward_hook": taps}
    terms = {"kd": _kd(temperature, alpha), **{layer: _hint(layer) for layer in hooked}}
    config = {
        "num_epochs": 1,
        "teacher": {**model, "sequential": [], "requires_grad": False},
        "student": {**model, "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = DistillationBox(teacher, student, {}, config, device, None, False, 1)
    box.teacher_model.eval()

    def train(batches: list[Batch]) -> None:
        box.student_model.train()
        for batch in batches:
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            loss = box.forward_process(inputs, targets, {})
            box.post_forward_process(loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return train


def _kd(temperature: float, alpha: float) -> dict[str, Any]:
    ends = {f"{role}_module_path": "." for role in ("student", "teacher")}
    ends |= {f"{role}_module_io": "output" for role in ("student", "teacher")}
    params = {**ends, "temperature": temperature, "alpha": alpha}
    return {"criterion": {"key": "KDLoss", "kwargs": params}, "weight": 1.0}


def _hint(layer: str) -> dict[str, Any]:
    params: dict[str, Any] = {
        "input": {"io": "output", "module_path": layer, "is_from_teacher": False},
        "target": {"io": "output", "module_path": layer, "is_from_teacher": True},
    }
    return {
        "criterion": {"key": "MSELoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": params},
        "weight": 1.0,
    }
