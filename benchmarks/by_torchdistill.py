"""The same steps by torchdistill, where it is installed (pip install torchdistill)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from engine import Train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.data.batch import Batch

REGRESSOR = "regressor"
"""What torchdistill puts behind the student's layers, in FitNet's first stage."""


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
    *,
    reduced: bool = False,
    spread: bool = False,
) -> Train:
    """Return a function that trains on batches as torchdistill's examples do.

    Args:
        teacher: frozen.
        student: trained by SGD.
        device: where both are.
        temperature: of KD.
        alpha: the labels' part in KD.
        hooked: layers of both that are compared by their mean squares too.
        reduced: whether the script has bf16 autocast around the box's forward, which the losses
            are a part of; torchdistill itself has no setting for it.
        spread: whether several processes exchange gradients. A box does so on CUDA alone, and
            takes a model out of its wrapper, so on a CPU the script has to wrap the box's own.
    """
    terms = {"kd": _kd(temperature, alpha)}
    terms |= {layer: _squares(layer, layer) for layer in hooked}
    model = {**_hooks(hooked), "sequential": []}
    config = {
        "num_epochs": 1,
        "teacher": {**model, "requires_grad": False},
        "student": {**model, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = _box(teacher, student, config, device)
    if spread:
        box.student_model = DistributedDataParallel(box.student_model)
    return _trained(box, device, reduced=reduced)


def hints_by_torchdistill(
    teacher: nn.Module,
    student: nn.Module,
    front: Sequence[str],
    regressor: Sequence[int],
    device: torch.device,
) -> Train:
    """Return a function that trains FitNet's first stage, both models cut by torchdistill.

    Args:
        teacher: frozen.
        student: trained by Adam, with the regressor.
        front: modules of both, one behind the other; those behind the last are cut off.
        regressor: channels that a 1x1 convolution from the student's last of these takes and gives.
        device: where both are.
    """
    inputs, outputs = regressor
    convolution = {"in_channels": inputs, "out_channels": outputs, "kernel_size": 1}
    added, layer = f"+{REGRESSOR}", front[-1]
    config = {
        "num_epochs": 1,
        "teacher": {**_hooks([layer]), "sequential": list(front), "requires_grad": False},
        "student": {
            **_hooks([added]),
            "adaptations": {REGRESSOR: {"key": "Conv2d", "kwargs": convolution}},
            "sequential": [*front, added],
            "requires_grad": True,
        },
        "optimizer": {"key": "Adam", "kwargs": {"lr": 1e-3}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"hint": _squares(added, layer)}},
        },
    }
    return _trained(_box(teacher, student, config, device), device)


def contrast_by_torchdistill(
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    ends: tuple[str, int, int],
    samples: int,
    drawn: Tensor,
    weight: float,
) -> Train:
    """Return a function that trains with labels and CRD, by the same negatives each time.

    Args:
        teacher: frozen, but for its head.
        student: trained by SGD.
        device: where both are.
        ends: a layer of both, how many numbers it gives, and how many an embedding of these has.
        samples: in the data.
        drawn: a row for itself and its negatives for each sample, int64 (B, K + 1), in place of
            what its loader draws.
        weight: of CRD.
    """
    layer, features, width = ends
    linear = {"in_features": features, "out_features": width}
    head = {"input_module_path": f"model.{layer}", "linear_kwargs": linear}
    model = {
        "forward_proc": "forward_batch_supp_dict",
        "forward_hook": {"input": ["empty"], "output": [f"model.{layer}", "normalizer"]},
        "auxiliary_model_wrapper": {"key": "Linear4CRD", "kwargs": head},
        "requires_grad": True,
    }
    contrast = {
        "student_norm_module_path": "normalizer",
        "student_empty_module_path": "empty",
        "teacher_norm_module_path": "normalizer",
        "input_size": width,
        "output_size": samples,
        "num_negative_samples": drawn.shape[1] - 1,
        "num_samples": samples,
    }
    terms = {
        "ce": _of_student("CrossEntropyLoss", ".", {"uses_label": True}),
        "crd": {"criterion": {"key": "CRDLoss", "kwargs": contrast}, "weight": weight},
    }
    config = {
        "num_epochs": 1,
        "teacher": {**model, "frozen_modules": ["model"]},
        "student": model,
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }

    def negatives(batch: Batch) -> dict[str, Tensor]:
        return {"pos_idx": batch.index, "contrast_idx": drawn}

    return _trained(_box(teacher, student, config, device), device, extras=negatives)


def _box(
    teacher: nn.Module, student: nn.Module, config: dict[str, Any], device: torch.device
) -> Any:
    from torchdistill.core.distillation import DistillationBox

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    return DistillationBox(teacher, student, {}, config, device, None, False, 1)


def _trained(
    box: Any,
    device: torch.device,
    *,
    reduced: bool = False,
    extras: Callable[[Batch], dict[str, Tensor]] = lambda batch: {},
) -> Train:
    box.teacher_model.eval()
    autocast = torch.autocast(device.type, torch.bfloat16) if reduced else nullcontext()

    def train(batches: Iterable[Batch]) -> None:
        box.student_model.train()
        for batch in batches:
            inputs = batch.inputs.to(device)
            targets = None if batch.targets is None else batch.targets.to(device)
            with autocast:
                loss = box.forward_process(inputs, targets, extras(batch))
            box.post_forward_process(loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return train


def _hooks(outputs: Sequence[str]) -> dict[str, Any]:
    hooks: dict[str, Any] = {"input": [], "output": list(outputs)}
    return {"forward_proc": "forward_batch_only", "forward_hook": hooks}


def _kd(temperature: float, alpha: float) -> dict[str, Any]:
    ends = {f"{role}_module_path": "." for role in ("student", "teacher")}
    ends |= {f"{role}_module_io": "output" for role in ("student", "teacher")}
    params = {**ends, "temperature": temperature, "alpha": alpha}
    return {"criterion": {"key": "KDLoss", "kwargs": params}, "weight": 1.0}


def _squares(student: str, teacher: str) -> dict[str, Any]:
    target = {"io": "output", "module_path": teacher, "is_from_teacher": True}
    return _of_student("MSELoss", student, target)


def _of_student(loss: str, layer: str, target: dict[str, Any]) -> dict[str, Any]:
    """Return a term that compares what a layer of the student gives with a target."""
    params: dict[str, Any] = {
        "input": {"io": "output", "module_path": layer, "is_from_teacher": False},
        "target": target,
    }
    return {
        "criterion": {"key": loss, "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": params},
        "weight": 1.0,
    }
