"""Overrides on the command line, which reach into what a stage inherits too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distill.config.yaml_document import Document, Path, override, path_text
from distill.errors import ConfigError, Fault, Location, did_you_mean

_ENTRY = re.compile(
    r"\s*(?:stages[.\[](?P<stage>[^.\[\]=]+)\]?\.)?"
    r"(?P<section>criterion|auxiliary|teachers|datasets|models)\.(?P<name>[^.\[\]=]+?)\s*="
)
"""An entry of a mapping of named things, which null takes out."""
_INSIDE_A_STAGE = re.compile(r"\s*stages[.\[](?P<stage>[^.\[\]=]+)\]?\.(?P<key>\w+)[.\[][^=]*=")


def override_experiment(document: Document, assignments: Sequence[str]) -> Document:
    """Return the document with assignments such as ``stages.kd.optimizer.params.lr=0.1`` done.

    Where the stage inherits the key, what it inherits is written out first and then changed. Null
    takes a term, an auxiliary module, a teacher, a data set or a model out.

    Raises:
        ConfigError: with a fault for each assignment that addresses nothing or has a bad value.
    """
    faults: list[Fault] = []
    for assignment in assignments:
        try:
            document = _written_out(_one_seed_key(document, assignment), assignment)
            changed = override(document, [assignment])
            document = _without_entry(document, changed, assignment)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return document


def _without_entry(before: Document, changed: Document, assignment: str) -> Document:
    """Take an entry out that null was assigned to.

    Raises:
        ConfigError: if there is none of that name.
    """
    match = _ENTRY.match(assignment)
    around = _path_around(changed, match)
    if match is None or around is None:
        return changed
    entries, given = _inside(changed.data, around), _inside(before.data, around)
    name = match["name"]
    if not isinstance(entries, dict) or entries.get(name, "") is not None:
        return changed
    if name not in (given or {}):
        hint = (
            did_you_mean(name, given or {}) or f" (there are: {', '.join(given or {}) or 'none'})"
        )
        text = path_text((*around, name), changed.data)
        message = f"null takes an entry out, and there is no '{name}' here{hint}"
        raise ConfigError([Fault(message, text, Location(f"-s {assignment}"))])
    del entries[name]
    path = (*around, name)
    kept = {p: place for p, place in changed.locations.items() if p[: len(path)] != path}
    return replace(changed, locations=kept)


def _path_around(document: Document, match: re.Match[str] | None) -> Path | None:
    """Return where the entries are that an assignment's is one of."""
    if match is None or (match["stage"] is None) != (match["section"] in ("datasets", "models")):
        return None
    if match["stage"] is None:
        return (match["section"],)
    stages = document.data.get("stages")
    number = _number(stages, match["stage"]) if isinstance(stages, list) else None
    return None if number is None else ("stages", number, match["section"])


def _inside(data: Any, path: Path) -> Any:
    for key in path:
        if isinstance(key, str) and not (isinstance(data, dict) and key in data):
            return None
        data = data[key]
    return data


def _one_seed_key(document: Document, assignment: str) -> Document:
    """Drop ``seed`` where ``seeds`` is given in its place, and the other way round."""
    other = {"seed": "seeds", "seeds": "seed"}.get(assignment.partition("=")[0].strip(), "")
    return replace(document, data={k: v for k, v in document.data.items() if k != other})


def _written_out(document: Document, assignment: str) -> Document:
    """Copy to the addressed stage the key that it inherits."""
    match = _INSIDE_A_STAGE.match(assignment)
    stages: Any = document.data.get("stages")
    if match is None or not isinstance(stages, list):
        return document
    number = _number(stages, match["stage"])
    if number is None or match["key"] == "data":  # whose keys are inherited one by one
        return document
    slots = {"teacher", "teachers"} if match["key"] in ("teacher", "teachers") else {match["key"]}
    if slots & stages[number].keys():
        return document
    for earlier in reversed(range(number)):
        if isinstance(stages[earlier], dict) and slots & stages[earlier].keys():
            return _copied(document, earlier, number, (slots & stages[earlier].keys()).pop())
    return document


def _copied(document: Document, source: int, target: int, key: str) -> Document:
    stages = list(document.data["stages"])
    stages[target] = {**stages[target], key: stages[source][key]}
    origin: Path = ("stages", source, key)
    places = {
        ("stages", target, *path[2:]): place
        for path, place in document.locations.items()
        if path[:3] == origin
    }
    data = {**document.data, "stages": stages}
    return replace(document, data=data, locations={**document.locations, **places})


def _number(stages: list[Any], name: str) -> int | None:
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(stages) and isinstance(stages[int(name)], dict):
        return int(name)
    return None
