"""Everything that what a teacher gives for a sample depends on, and the hash over it."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
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

VERSIONED = ("torch", "torchvision", "numpy", "PIL")
"""Packages whose code is known by their version."""
OWN = "distill"
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
        seed: of the run, which batch transforms depend on.
        device: its type, on which they may draw.
    """
    teacher, data = stage.teachers[role], stage.data
    described = builder.experiment.datasets[data.train]
    return {
        "teacher": {
            "model": _model(builder, teacher),
            "weights": weights,
            "redesign": _plain(teacher.redesign),
            "special": _plain(teacher.special),
            "fast": asdict(teacher.fast) if teacher.fast is not None else None,
            "precision": stage.precision,
            "code": code_of([*_made_in(builder, teacher), *map(type, model.modules())]),
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
        "mixed": _mixed(builder, stage, seed, device),
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


def weights_in(file: Path) -> str:
    """Return the same of a safetensors file."""
    return weights_of(safetensors.torch.load_file(file))


def _model(builder: Builder, teacher: Teacher) -> dict[str, Any]:
    described = builder.experiment.models[teacher.model]
    return {
        "component": _plain(described.component),
        "redesign": _plain(described.redesign),
    }


def _made_in(builder: Builder, teacher: Teacher) -> list[Any]:
    """Return what builds a teacher and what is put around it."""
    described = builder.experiment.models[teacher.model]
    made = [("models", described.component), ("model_redesigners", described.redesign)]
    made += [("model_redesigners", teacher.redesign), ("special_modules", teacher.special)]
    return [
        builder.registry.find(kind, component.type).factory
        for kind, component in made
        if component is not None
    ]


def described_data(described: Dataset) -> dict[str, Any]:
    """Return as plain data how the file describes a data set."""
    return {
        "component": _plain(described.component),
        "wrappers": [_plain(c) for c in described.wrappers],
        "joint_transforms": [_plain(c) for c in described.joint_transforms],
        "transforms": [_plain(c) for c in described.transforms],
        "collate": _plain(described.collate),
    }


def _mixed(builder: Builder, stage: Stage, seed: int, device: str) -> dict[str, Any] | None:
    """Return what decides with which other sample one is mixed, and how."""
    data = stage.data
    if not data.batch_transforms:
        return None
    return {
        "batch_transforms": [_plain(c) for c in data.batch_transforms],
        "seed": seed,
        "batch_size": data.batch_size,
        "drop_last": data.drop_last,
        "views_at_once": data.views_at_once,
        "device": device,
        "code": code_of(
            type(made) for made in builder.components("batch_transforms", data.batch_transforms)
        ),
    }


def _plain(component: Component | None) -> Any:
    return None if component is None else [component.type, dict(component.params)]


def made_by(source: Source) -> list[Any]:
    """Return the classes and functions that a sample of a data set goes through."""
    made: list[Any] = [*source.transforms, *source.joint_transforms, source.collate]
    made += [form for form in source.batched if form is not None]
    dataset: Any = source.dataset
    for _ in range(100):  # wrappers, as torch's, call what is inside ``dataset``
        made.append(dataset)
        dataset = getattr(dataset, "dataset", None)
        if dataset is None:
            break
    return [thing if inspect.isfunction(thing) else type(thing) for thing in made]


def code_of(things: Iterable[Any]) -> dict[str, str]:
    """Return a version or a hash for all code that classes and functions come from.

    Of a package it is that of all of its files, of distill itself that of the file alone.
    """
    bases = [base for thing in things for base in _bases(thing)]
    modules = {name for base in bases if (name := getattr(base, "__module__", None))}
    found: dict[str, str] = {}
    for name in sorted(modules):
        top = name.partition(".")[0]
        if top in VERSIONED:
            found[top] = str(getattr(sys.modules[top], "__version__", ""))
        elif top not in sys.stdlib_module_names:
            key = name if top == OWN else top
            found[key] = _hash_of(key)
    return found


def _bases(thing: Any) -> Iterable[Any]:
    return inspect.getmro(thing) if inspect.isclass(thing) else (thing,)


def _hash_of(name: str) -> str:
    """Return a hash over the files that a module, or all of a package, comes from.

    Code that is in no file is never the same as before.
    """
    files = _files(sys.modules.get(name))
    if not files:
        return uuid.uuid4().hex
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _files(module: ModuleType | None) -> list[Path]:
    """Return a package's files; of a module by itself also those that it may have imported."""
    if module is None:
        return []
    is_own = module.__name__.partition(".")[0] == OWN
    file = getattr(module, "__file__", None)
    if not is_own and hasattr(module, "__path__"):
        return sorted(path for folder in module.__path__ for path in Path(folder).rglob("*.py"))
    if file is None or is_own:
        return [] if file is None else [Path(file)]
    folder = Path(file).parent
    loaded = (getattr(other, "__file__", None) for other in [*sys.modules.values()])
    return sorted({Path(path) for path in loaded if path and Path(path).parent == folder})
