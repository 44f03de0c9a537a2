"""Whether a teacher has been measured on the same data before."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from distill.config.experiment import Stage
from distill.data.labels import labels
from distill.data.source import Source
from distill.errors import DataError
from distill.training.code_identity import code_of, made_by
from distill.training.seed_run import SeedRun
from distill.training.store_identity import described_data, samples_seen


def measured_key(run: SeedRun, stage: Stage) -> str:
    """Return a hash over what a teacher is measured on, as far as it is looked at.

    Of the samples those are some, with transforms, and the labels of all that are told unread.
    """
    experiment = run.builder.experiment
    looked_at: list[Any] = [[m.component.type, dict(m.component.params)] for m in stage.metrics]
    looked_at.append(code_of(run.metrics(stage.metrics, stage.teachers).values()))
    for name in stage.data.validate:
        source = run.sources[name]
        of = described_data(experiment.datasets[name])
        looked_at.append([of, len(source), samples_seen(source), _labels(source)])
        looked_at.append(code_of(made_by(source)))
    looked_at += [stage.precision, stage.data.validate]
    return hashlib.sha256(json.dumps(looked_at, default=str).encode()).hexdigest()[:20]


def _labels(source: Source) -> list[int] | None:
    """Return the label of every sample, ``None`` where only reading would tell."""
    try:
        return labels(source.dataset, read=False)
    except DataError:
        return None
