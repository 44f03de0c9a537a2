"""Whether a teacher has been measured on the same data before."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy

from distill import randomness
from distill.config.experiment import Stage
from distill.data.fingerprint import fingerprint
from distill.data.source import Source
from distill.errors import DataError
from distill.training.seed_run import SeedRun
from distill.training.store_identity import code_of, described_data, made_by

MEASURED_ON = 64
"""So many samples of validation data tell whether they are those of an earlier measurement."""


def measured_key(run: SeedRun, stage: Stage) -> str:
    """Return a hash over what a teacher is measured on."""
    experiment = run.builder.experiment
    looked_at: list[Any] = [[m.component.type, dict(m.component.params)] for m in stage.metrics]
    looked_at.append(code_of(run.metrics(stage.metrics, stage.teachers).values()))
    for name in stage.data.validate:
        source = run.sources[name]
        some = numpy.linspace(0, len(source) - 1, min(MEASURED_ON, len(source))).astype(int)
        seen = [_seen(source, index) for index in some.tolist()]
        looked_at.append([described_data(experiment.datasets[name]), len(source), seen])
        looked_at.append(code_of(made_by(source)))
    looked_at += [stage.precision, stage.data.validate]
    return hashlib.sha256(json.dumps(looked_at, default=str).encode()).hexdigest()[:20]


def _seen(source: Source, index: int) -> int:
    with randomness.seeded(0, "a look at data", index):
        try:
            sample = source.read(index)
            return fingerprint((sample.input, sample.target))
        except DataError:
            return 0
