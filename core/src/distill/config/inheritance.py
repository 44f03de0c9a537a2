"""What a stage takes over from the stage before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill import reference
from distill.config.yaml_document import Path

DEFAULT_METRICS = ["accuracy"]
STAGE_DEFAULTS: dict[str, Any] = {
    "teachers": {},
    "auxiliary": {},
    "freeze": [],
    "scheduler": None,
    "clip": None,
    "precision": "fp32",
    "channels_last": False,
    "compile": [],
    "ema": None,
    "parallel": "ddp",
    "sync_batchnorm": True,
    "term_gradients": False,
    "evaluate": {"every": 1, "unit": "epochs"},
    "metrics": DEFAULT_METRICS,
    "best_by": None,
    "keep": "last",
}
DATA_DEFAULTS: dict[str, Any] = {
    "validate": None,
    "accumulate": 1,
    "drop_last": False,
    "sampler": None,
    "batch_sampler": None,
    "batch_transforms": [],
    "views": None,
    "views_at_once": 1,
    "in_memory": False,
    "workers": 0,
    "prefetch": 2,
    "pin_memory": None,
    "worker_timeout": 600,
    "on_bad_sample": "raise",
}
STAGE_REQUIRED: dict[str, Any] = {
    "epochs": 1,
    "data": {**DATA_DEFAULTS},
    "student": {"model": ""},
    "criterion": {},
    "optimizer": {"type": ""},
}
"""What a stage must have, and what stands in for it while the rest of a faulty file is checked."""
DATA_REQUIRED: dict[str, Any] = {"train": "", "batch_size": 1}


@dataclass
class StageDraft:
    """A stage's plain data after inheritance, and where each key was written."""

    name: str
    path: Path
    values: dict[str, Any]
    places: dict[str, Path]
    origins: dict[str, str]


def inherit(stages: Sequence[Mapping[str, Any]]) -> list[StageDraft]:
    """Fill into each stage what it leaves out from the stage before; null clears."""
    drafts: list[StageDraft] = []
    before = StageDraft("", (), dict(STAGE_DEFAULTS), {}, {})
    for number, given in enumerate(stages):
        path: Path = ("stages", number)
        written, places = _slots(path, given)
        if before.values.get("data") and "data" in written:
            written["data"] = {**before.values["data"], **written["data"]}
        elif "data" in written:
            written["data"] = {**DATA_DEFAULTS, **written["data"]}
        cleared = {k: STAGE_DEFAULTS[k] for k, v in written.items() if v is None}
        draft = StageDraft(
            given["name"],
            path,
            {**before.values, **written, **cleared},
            {**before.places, **places},
            {**before.origins, **dict.fromkeys(written, given["name"])},
        )
        drafts.append(draft)
        before = draft
    return drafts


def _slots(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return a stage's own values and places, one teacher written as several."""
    values = {k: v for k, v in given.items() if k != "name"}
    places: dict[str, Path] = {key: (*path, key) for key in values}
    for key in values.get("data") or {}:
        places[f"data.{key}"] = (*path, "data", key)
    if "teacher" in values:
        one = values.pop("teacher")
        values["teachers"] = {reference.TEACHER: one} if one else {}
        places["teachers"] = places.pop("teacher")
        places["teachers.teacher"] = places["teachers"]
    elif values.get("teachers"):
        base = places["teachers"]
        places.update({f"teachers.{role}": (*base, role) for role in values["teachers"]})
    return values, places
