"""Experiments on toys, with a registry that has them whatever is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from distill import builtin
from distill.config.experiment import Experiment
from distill.config.load import load
from distill.registry import SINGULAR, Entry, Registry
from distill.testing.toys import ToyConvNet, ToyData, ToyMLP


def toy_registry(**more: Mapping[str, Callable[..., Any]]) -> Registry:
    """Return core's own components, the toys, and ``more``: kind -> name -> factory."""
    toys: Mapping[str, Mapping[str, Callable[..., Any]]] = {
        "datasets": {"ToyData": ToyData},
        "models": {"ToyMLP": ToyMLP, "ToyConvNet": ToyConvNet},
    }
    own: Mapping[str, Mapping[str, Callable[..., Any]]] = {
        kind: getattr(builtin, f"distill_{kind}", dict)() for kind in SINGULAR
    }
    return Registry(
        Entry(kind, name, factory, provider)
        for provider, offer in (("distill-core", own), ("toys", toys), ("test", more))
        for kind, factories in offer.items()
        for name, factory in factories.items()
    )


def toy_experiment(folder: Path, *stages: Mapping[str, Any], **keys: Any) -> Experiment:
    """Write an experiment on toys to ``folder/toy.yaml`` and load it.

    Args:
        folder: where the file goes.
        stages: their keys; the first takes what it leaves out from a plain training of ``mlp``.
        keys: of the experiment, in place of the usual ones.
    """
    first = {
        "epochs": 2,
        "data": {"train": "train", "validate": "val", "batch_size": 8},
        "student": {"model": "mlp"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    }
    described = [{"name": f"stage{number}", **stage} for number, stage in enumerate(stages)]
    experiment = {
        "name": "toy",
        "device": "cpu",
        "datasets": {
            "train": {"type": "ToyData", "params": {"size": 20}},
            "val": {"type": "ToyData", "params": {"size": 12, "seed": 1}},
        },
        "models": {
            "mlp": {"type": "ToyMLP"},
            "wide": {"type": "ToyMLP", "params": {"hidden": 12}},
        },
        "observers": [],
        **keys,
        "stages": [{**first, **described[0]}, *described[1:]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toy.yaml"
    # In one piece, since several processes may write it at once.
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(yaml.safe_dump(experiment, sort_keys=False), "utf-8")
    written.replace(file)
    return load(file)
