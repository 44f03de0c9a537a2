"""Everything that what a teacher gives for a sample depends on, and the hash over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import nn

from distill import randomness
from distill.config.experiment import Component, Dataset, Stage, Teacher
from distill.data.fingerprint import fingerprint
from distill.data.source import Source
from distill.errors import DataError
from distill.model.wiring import Address
from distill.store.near import parts
from distill.training.build import Builder
from distill.training.code_identity import code_of, hash_of_file, hash_of_files, made_by

COMPUTES = ("distill.model.adapter", "distill.model.fast", "distill.store.encoding")
"""What of distill itself makes outputs into what is kept."""
SEEN_OF = 64
"""So many samples tell whether a data set is the same in another place."""


def identity(
    builder: Builder,
    stage: Stage,
    role: str,
    addresses: Iterable[Address],
    model: nn.Module,
    weights: str,
    source: Source,
    seed: int,
    device: str,
    processes: int | None = None,
) -> dict[str, Any]:
    """Return as plain data what the outputs of a teacher in a stage depend on.

    Args:
        builder: of the experiment.
        stage: in which it teaches.
        role: its role.
        addresses: what is read of it.
        model: it, or its like on the meta device.
        weights: their hash.
        source: the stage's training data.
        seed: of the run, which batch transforms depend on, and buffers may.
        device: its type, on which they may draw.
        processes: of the run, if what batch transforms do depends on how many share a batch.
    """
    teacher, data = stage.teachers[role], stage.data
    built_from = _built_from(builder, teacher)
    factories = [
        builder.registry.find(kind, component.type).factory for kind, component in built_from
    ]
    described = builder.experiment.datasets[data.train]
    return {
        "teacher": {
            "model": _model(builder, teacher),
            "weights": weights,
            "buffers": _unsaved(builder, teacher, model, seed),
            "redesign": _plain(teacher.redesign),
            "special": _plain(teacher.special),
            "fast": asdict(teacher.fast) if teacher.fast is not None else None,
            "precision": stage.precision,
            "files": _files(component for _, component in built_from),
            "code": code_of([*factories, *map(type, model.modules())]),
            "distill": hash_of_files(COMPUTES),
        },
        "asked": sorted({json.dumps([address.value, *address.keys]) for address in addresses}),
        "kept": asdict(teacher.store) if teacher.store is not None else None,
        "data": {
            **described_data(described),
            "samples": len(source),
            "in_memory": data.in_memory,
            "code": code_of(made_by(source)),
        },
        "views": data.views,
        "mixed": _mixed(builder, stage, seed, device, processes),
    }


def digest(identity: Mapping[str, Any]) -> str:
    """Return the name of the store for an identity: a hash over those of its parts."""
    text = json.dumps(parts(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def samples_seen(source: Source) -> list[int]:
    """Return fingerprints of some samples from all over a data set, 0 for one without any.

    A transform that draws gives the same each time.
    """
    count = min(SEEN_OF, len(source))
    return [_seen(source, index) for index in numpy.linspace(0, len(source) - 1, count, dtype=int)]


def _seen(source: Source, index: int) -> int:
    with randomness.seeded(0, "a sample that tells a data set", int(index)):
        try:
            sample = source.read(int(index))
            return fingerprint((sample.input, sample.target))
        except DataError:
            return 0


def weights_of(state: Mapping[str, torch.Tensor]) -> str:
    """Return a hash over names, types, shapes and bytes of a state dict."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _unsaved(builder: Builder, teacher: Teacher, model: nn.Module, seed: int) -> str:
    """Return a hash over buffers that are in no state dict, empty where there are none.

    As they are when the model is built, since it may not be loaded, and some change as it runs.
    """
    names = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    if not names:
        return ""
    built = builder.model(teacher.instance, seed).named_buffers()
    found = {name: buffer for name, buffer in built if name in names}
    return weights_of(found) if found else ""  # some come with the first forward


def weights_in(file: Path) -> str:
    """Return the same of a safetensors file."""
    return weights_of(safetensors.torch.load_file(file))


def _model(builder: Builder, teacher: Teacher) -> dict[str, Any]:
    described = builder.experiment.models[teacher.model]
    return {
        "component": _plain(described.component),
        "redesign": _plain(described.redesign),
    }


def _built_from(builder: Builder, teacher: Teacher) -> list[tuple[str, Component]]:
    """Return what builds a teacher and what is put around it, each with its kind."""
    described = builder.experiment.models[teacher.model]
    around = [
        ("model_redesigners", described.redesign),
        ("model_redesigners", teacher.redesign),
        ("special_modules", teacher.special),
    ]
    given = [(kind, component) for kind, component in around if component is not None]
    return [("models", described.component), *given]


def described_data(described: Dataset) -> dict[str, Any]:
    """Return as plain data how the file describes a data set.

    Files that it reads its samples from are left out: each sample has a fingerprint of its own.
    """
    return {
        "component": _plain(described.component),
        "wrappers": [_plain(c) for c in described.wrappers],
        "joint_transforms": [_plain(c) for c in described.joint_transforms],
        "transforms": [_plain(c) for c in described.transforms],
        "collate": _plain(described.collate),
        "files": _files([*described.joint_transforms, *described.transforms, described.collate]),
    }


def _mixed(
    builder: Builder, stage: Stage, seed: int, device: str, processes: int | None
) -> dict[str, Any] | None:
    """Return what decides with which other sample one is mixed, and how."""
    data = stage.data
    if not data.batch_transforms:
        return None
    return {
        "batch_transforms": [_plain(c) for c in data.batch_transforms],
        "files": _files(data.batch_transforms),
        "seed": seed,
        "batch_size": data.batch_size,
        "drop_last": data.drop_last,
        "views_at_once": data.views_at_once,
        "device": device,
        "processes": processes,
        "code": code_of(
            type(made) for made in builder.components("batch_transforms", data.batch_transforms)
        ),
    }


def _plain(component: Component | None) -> Any:
    return None if component is None else [component.type, dict(component.params)]


def _files(components: Iterable[Component | None]) -> dict[str, str]:
    """Return hashes of the files that parameters of components name."""
    params = [dict(component.params) for component in components if component is not None]
    return {name: hash_of_file(Path(name)) for name in sorted(_named_files(params))}


def _named_files(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return _named_files(list(value.values()))
    if isinstance(value, (list, tuple)):
        return {name for each in value for name in _named_files(each)}
    try:
        return {value} if isinstance(value, str) and Path(value).is_file() else set()
    except (OSError, ValueError):  # too long for a name, or none
        return set()
