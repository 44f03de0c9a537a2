"""The frame of an experiment file as a JSON Schema, and its violations as faults people read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import jsonschema

from distill.config.experiment import CONTROLS
from distill.config.yaml_document import Document, Path, path_text
from distill.errors import Fault, did_you_mean
from distill.signature import show
from distill.store_settings import ENCODINGS

Schema = dict[str, Any]

NAME = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
"""Names inside a file: no dot, since dots part the segments of references and overrides."""


def _mapping(properties: Schema, *required: str, **more: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def _named(items: Schema, **more: Any) -> Schema:
    return {
        "type": "object",
        "propertyNames": {"pattern": f"^{NAME}$"},
        "additionalProperties": items,
        **more,
    }


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
SWITCH = ["boolean", "null", "object"]
"""The types of what is on, off, or on in another way than usual."""
COUNT: Schema = {"type": "integer", "minimum": 1}
SEED: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
NAMED: Schema = {"type": "string", "pattern": f"^{NAME}$"}

_PARTS: Schema = {"type": TEXT, "params": {"type": "object"}}
COMPONENT = _mapping(_PARTS, "type")
COMPONENT_OR_NAME: Schema = {**COMPONENT, "type": ["object", "string"]}
COMPONENTS: Schema = {"type": "array", "items": COMPONENT_OR_NAME}
NAMES: Schema = {"type": "array", "items": TEXT}
UNIT: Schema = {"enum": ["epochs", "steps"]}
FROM_ZERO: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
WIRE: Schema = {"type": ["string", "array"], "minLength": 1, "items": TEXT, "minItems": 1}
WIRING: Schema = {"type": "object", "additionalProperties": WIRE}
COMPONENT_OR_NONE: Schema = {**COMPONENT, "type": ["object", "string", "null"]}
ROLE: Schema = {"model": NAMED, "redesign": COMPONENT_OR_NAME, "special": COMPONENT_OR_NONE}
DATASET = _mapping(
    {
        **_PARTS,
        "wrappers": COMPONENTS,
        "joint_transforms": COMPONENTS,
        "transforms": COMPONENTS,
        "collate": COMPONENT_OR_NONE,
    },
    "type",
)
MODEL = _mapping(
    {**_PARTS, "checkpoint": TEXT, "seed": SEED, "redesign": COMPONENT_OR_NAME}, "type"
)
STORE: Schema = {
    **_mapping({"encoding": {"enum": [*ENCODINGS]}, "top": COUNT, "temperature": POSITIVE}),
    "type": SWITCH,
}
DEVICE: Schema = {"type": "string", "pattern": r"^(auto|cpu|cuda(:\d+)?|mps)$"}
PRECISION: Schema = {"enum": ["fp32", "bf16", "fp16"]}
FAST: Schema = {
    **_mapping(
        {
            "fold_batchnorm": FLAG,
            "channels_last": FLAG,
            "precision": PRECISION,
            "compile": FLAG,
            "device": DEVICE,
        }
    ),
    "type": SWITCH,
}
TEACHER = _mapping(
    {
        **ROLE,
        "mode": {"enum": ["eval", "train"]},
        "min_accuracy": {"type": "number", "minimum": 0, "maximum": 1},
        "control": {"enum": [*CONTROLS, None]},
        "store": STORE,
        "fast": FAST,
    },
    "model",
)
AUXILIARY = _mapping(
    {
        **_PARTS,
        "module": TEXT,
        "model": NAMED,
        "reuse": NAMED,
        "frozen": FLAG,
        "inputs": WIRING,
    }
)
WEIGHT: Schema = {
    **_mapping(
        {
            "start": {"type": "number"},
            "end": {"type": "number"},
            "over": FROM_ZERO,
            "after": FROM_ZERO,
            "stop": {"type": ["integer", "null"], "minimum": 1},
            "shape": {"enum": ["linear", "cosine"]},
            "unit": UNIT,
        }
    ),
    "type": ["number", "object"],
}
TERM = _mapping(
    {**_PARTS, "inputs": WIRING, "adapter": {"enum": ["auto", None]}, "weight": WEIGHT}, "type"
)
FREEZE: Schema = {
    **_mapping({"match": {**NAMES, "minItems": 1}, "statistics": FLAG}, "match"),
    "type": ["string", "object"],
    "minLength": 1,
}
DATA = _mapping(
    {
        "train": NAMED,
        "validate": {
            "type": ["string", "array", "null"],
            "pattern": f"^{NAME}$",
            "items": NAMED,
            "uniqueItems": True,
        },
        "batch_size": COUNT,
        "accumulate": COUNT,
        "drop_last": FLAG,
        "sampler": COMPONENT_OR_NONE,
        "batch_sampler": COMPONENT_OR_NONE,
        "batch_transforms": COMPONENTS,
        "views": {**COUNT, "type": ["integer", "null"]},
        "views_at_once": COUNT,
        "in_memory": FLAG,
        "workers": FROM_ZERO,
        "prefetch": COUNT,
        "pin_memory": {"type": ["boolean", "null"]},
        "worker_timeout": POSITIVE,
        "on_bad_sample": {"enum": ["raise", "skip"]},
    }
)
METRIC: Schema = {
    **_mapping({**_PARTS, "name": NAMED}, "type"),
    "type": ["object", "string"],
}
METRICS: Schema = {"type": "array", "items": METRIC}
GROUP = _mapping({"match": {**NAMES, "minItems": 1}, "params": {"type": "object"}}, "match")
OPTIMIZER = _mapping(
    {**_PARTS, "groups": {"type": "array", "items": GROUP}, "no_decay": NAMES}, "type"
)
SCHEDULER = _mapping({**_PARTS, "unit": UNIT, "until": COUNT, "watch": TEXT}, "type")
STAGE = _mapping(
    {
        "name": NAMED,
        "epochs": COUNT,
        "data": DATA,
        "teacher": _or_null(TEACHER),
        "teachers": _or_null(_named(TEACHER)),
        "student": _mapping(ROLE, "model"),
        "auxiliary": _or_null(_named(AUXILIARY)),
        "freeze": {"type": ["array", "null"], "items": FREEZE},
        "criterion": _named(TERM, minProperties=1),
        "optimizer": OPTIMIZER,
        "scheduler": {**SCHEDULER, "type": ["object", "array", "null"], "items": SCHEDULER},
        "clip": _or_null(_mapping({"norm": POSITIVE, "value": POSITIVE}, minProperties=1)),
        "precision": PRECISION,
        "channels_last": FLAG,
        "compile": {"type": ["array", "null"], "items": NAMED, "uniqueItems": True},
        "ema": _or_null(
            _mapping(
                {"decay": {"type": "number", "minimum": 0, "maximum": 1}, "warmup": FLAG}, "decay"
            )
        ),
        "parallel": {"enum": ["ddp", "fsdp"]},
        "sync_batchnorm": FLAG,
        "term_gradients": FLAG,
        "evaluate": _mapping({"every": COUNT, "unit": UNIT}),
        "metrics": METRICS,
        "best_by": {"type": ["string", "null"], "minLength": 1},
        "keep": {"enum": ["last", "best", "ema"]},
    },
    "name",
)
TEST = _mapping({"dataset": NAMED, "metrics": METRICS, "baseline": NAMED}, "dataset")
EXPERIMENT: Schema = {
    **_mapping(
        {
            "name": {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
            "seed": SEED,
            "seeds": {"type": "array", "items": SEED, "minItems": 1, "uniqueItems": True},
            "device": DEVICE,
            "log_every": COUNT,
            "datasets": _named(DATASET, minProperties=1),
            "models": _named(MODEL, minProperties=1),
            "stages": {"type": "array", "items": STAGE, "minItems": 1},
            "test": _or_null(TEST),
            "observers": {"type": "array", "items": COMPONENT_OR_NAME},
        },
        "name",
        "datasets",
        "models",
        "stages",
    ),
    # A place of one's own for anchors.
    "patternProperties": {"^x-": {}},
}


# The standard takes 3.0 for an integer; a person who wrote it meant something else.
_CHECKER = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
    "integer", lambda _, value: type(value) is int
)
_VALIDATOR = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_CHECKER)(
    EXPERIMENT
)


def frame_faults(document: Document) -> list[tuple[Path, Fault]]:
    """Return every violation of the frame with the path of the value to blame."""
    return [
        (path, Fault(message, path_text(path, document.data), document.locate(path)))
        for error in _VALIDATOR.iter_errors(document.data)
        for path, message in _messages(error)
    ]


def _messages(error: jsonschema.ValidationError) -> Iterator[tuple[Path, str]]:
    path = tuple(error.absolute_path)
    if error.validator == "additionalProperties":
        properties = _schema_of(error)["properties"]
        for key in error.instance:
            if not _known(key, _schema_of(error)):
                yield (*path, key), _unknown_key(key, properties)
    elif error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance and not _misspelt(key, error):
                yield path, f"the key '{key}' is missing"
    elif "propertyNames" in error.schema_path:
        yield (*path, error.instance), f"'{error.instance}' is no name; {_NAME_RULE}"
    else:
        yield path, _wrong_value(error)


def _schema_of(error: jsonschema.ValidationError) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], error.schema)


def _known(key: str, schema: Mapping[str, Any]) -> bool:
    return key in schema["properties"] or ("patternProperties" in schema and key.startswith("x-"))


def _unknown_key(key: str, known: Mapping[str, Any]) -> str:
    return f"unknown key '{key}'" + (did_you_mean(key, known) or f" (known: {', '.join(known)})")


def _misspelt(missing: str, error: jsonschema.ValidationError) -> bool:
    """Whether an unknown key stands there in place of the missing one: one mistake, one fault."""
    unknown = [key for key in error.instance if not _known(key, _schema_of(error))]
    return any(did_you_mean(key, [missing]) for key in unknown)


_NAME_RULE = "use letters, digits, _ and -, beginning with a letter"
_KINDS = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


def _as_mapping(error: jsonschema.ValidationError) -> str:
    """Return how a text is written where a mapping with one key that must be there is expected."""
    required = _schema_of(error).get("required", ())
    if not isinstance(error.instance, str) or len(required) != 1:
        return ""
    return f"; write {{{required[0]}: {error.instance}}}"


def _wrong_value(error: jsonschema.ValidationError) -> str:
    limit, got = error.validator_value, show(error.instance)
    if error.validator == "type":
        kinds = [limit] if isinstance(limit, str) else limit
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        if kinds == SWITCH:
            expected += f" of {', '.join(_schema_of(error)['properties'])}"
        return f"expected {expected}, got {got}{_as_mapping(error)}"
    if error.validator == "enum":
        words = [word for word in limit if word is not None]
        nearest = did_you_mean(str(error.instance), words)
        return f"expected {'one of ' if words[1:] else ''}{', '.join(words)}, got {got}{nearest}"
    if error.validator == "pattern":
        return f"'{error.instance}' does not fit here; {_PATTERN_RULES.get(limit, _NAME_RULE)}"
    return {
        "minimum": f"must be at least {limit}, got {got}",
        "exclusiveMinimum": f"must be above {limit}, got {got}",
        "maximum": f"must be at most {limit}, got {got}",
        "minItems": "the list is empty",
        "minProperties": "is empty",
        "minLength": "the text is empty",
        "uniqueItems": "the list names something twice",
    }[str(error.validator)]


_PATTERN_RULES = {
    EXPERIMENT["properties"]["name"]["pattern"]: "a run's name is up to 64 letters, digits, . _ -",
    EXPERIMENT["properties"]["device"]["pattern"]: "expected auto, cpu, cuda, cuda:<n> or mps",
}
