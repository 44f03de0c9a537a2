"""What sets a store apart from another one that might have been taken for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import StorageError, as_yaml
from distill.store.moved import NAMING, SEEN, Place, moved_places
from distill.store.rows import META, read_meta

WORDS = {
    "teacher.model": "another model or other parameters of it",
    "teacher.weights": "other weights of the teacher",
    "teacher.buffers": "other buffers of the teacher",
    "teacher.redesign": "another redesign of the teacher",
    "teacher.special": "another special module",
    "teacher.fast": "another fast form of the teacher",
    "teacher.precision": "another precision",
    "teacher.files": "other contents of a file that the model's parameters name",
    "teacher.code": "other code of the model",
    "teacher.distill": "another version of distill",
    "asked": "other values asked of the teacher",
    "kept.encoding": "another encoding",
    "kept.top": "another top",
    "kept.temperature": "another temperature",
    "data.component": "another data set",
    "data.wrappers": "other wrappers of the data set",
    "data.joint_transforms": "other joint transforms",
    "data.transforms": "other transforms",
    "data.collate": "another collate function",
    "data.files": "other contents of a file that transforms or the collate function name",
    "data.samples": "another number of samples",
    "data.in_memory": "another data.in_memory",
    "data.code": "other code of the data set or its transforms",
    "views": "another number of views",
    "mixed": "other batch transforms",
    "mixed.seed": "another seed, which batch transforms draw from",
    "mixed.batch_size": "another batch size, on which mixed samples depend",
    "mixed.drop_last": "another data.drop_last, on which mixed samples depend",
    "mixed.views_at_once": "another data.views_at_once, on which mixed samples depend",
    "mixed.device": "another device, on which samples are mixed",
    "mixed.processes": "another number of processes, on which mixed samples depend",
    "mixed.files": "other contents of a file that batch transforms name",
    "mixed.code": "other code of the batch transforms",
}
IMPLIED = {
    "teacher.model": ("teacher.code",),
    "kept.encoding": ("kept.top", "kept.temperature"),
    "data.component": ("data.samples", "data.code"),
    "data.transforms": ("data.code",),
    "data.joint_transforms": ("data.code",),
    "data.wrappers": ("data.samples", "data.code"),
    "mixed.batch_transforms": ("mixed.code",),
}
"""What tells nothing more where the other differs."""
SHORT = 24
"""Characters up to which values themselves are told."""


def parts(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of each part of what a store belongs to, by name: all of it, in two levels."""
    return {name: _hash(value) for name, value in _flat(identity)}


def _flat(identity: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield f"{name}.{key}", inner
        else:
            yield name, value


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def nearest(
    stores: Path,
    identity: Mapping[str, Any],
    teacher: str,
    leave: frozenset[str] = frozenset(),
    seen: Sequence[int] = (),
) -> str:
    """Say what the store most like one that is not there was made with instead.

    Args:
        stores: the folder.
        identity: of the store that is not there.
        teacher: name of the model; a store of that name or of the same data set may be told of.
        leave: names of stores not to look at.
        seen: fingerprints of some of the samples, see ``distill.store.moved``.

    Returns:
        A line, empty without such a store.
    """
    wanted, found = parts(identity), []
    for folder in stores.iterdir() if stores.is_dir() else ():
        if folder.name.startswith(".") or folder.name in leave:
            continue
        try:
            meta = read_meta(folder)
            known = meta["identity"]
            its = meta.get("parts") or parts(known)
            is_like = _is_of(meta, teacher) or its.get("data.component") == wanted["data.component"]
            used = (folder / META).stat().st_mtime
        except (StorageError, OSError, LookupError, AttributeError, TypeError):
            continue  # damaged, of another version, or no store at all
        differing = _differing(its, wanted)
        if is_like and 0 < len(differing) <= MOST_DIFFERING:
            found.append((len(differing), -used, folder.name, differing, meta))
    if not found:
        return ""
    _, _, name, differing, meta = min(found, key=lambda one: one[:3])
    said = ", ".join(_words(differing, meta, identity, seen))
    return f"store {name[:SHOWN]} is not used: it was made with {said}"


def _words(
    differing: Sequence[str],
    meta: Mapping[str, Any],
    identity: Mapping[str, Any],
    seen: Sequence[int],
) -> Iterator[str]:
    """Yield what differs in words; of a data set that has only been moved, from where to where."""
    before, now = dict(_flat(meta["identity"])), dict(_flat(identity))
    places = moved_places(meta["identity"], identity)
    if places:
        are_others = meta.get(SEEN) and seen and meta[SEEN] != list(seen)
        yield moved_text(places) + (", where samples differ" if are_others else "")
    for part in differing:
        if not (places and part in IN_PLACES):
            yield _word(part, before.get(part), now.get(part))


IN_PLACES = tuple(f"data.{key}" for key in NAMING)


def moved_text(places: Sequence[Place]) -> str:
    """Return from where to where a data set has been moved."""
    return "the data set at " + ", ".join(f"{before} (now at {now})" for before, now in places)


MOST_DIFFERING = 3
"""Stores that are set apart by more are of something else."""
SHOWN = 8
"""So many characters of a store's name are shown, by which commands know it too."""


def _is_of(meta: Mapping[str, Any], teacher: str) -> bool:
    return bool(meta.get("about", {}).get("teacher") == teacher)


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names of parts that differ, less those that follow from others."""
    names = [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]
    if "mixed" in names:  # there are batch transforms on one side only
        names = [name for name in names if not name.startswith("mixed.")]
    implied = {other for name in names for other in IMPLIED.get(name, ())}
    return [name for name in names if name not in implied]


def _word(part: str, before: Any, now: Any) -> str:
    """Return a part in words, with both values if they are short."""
    word = WORDS.get(part) or WORDS.get(part.partition(".")[0]) or f"another {part}"
    if part == "asked":
        before, now = (", ".join(references(value or [])) for value in (before, now))
    is_plain = all(value is None or isinstance(value, (str, int, float)) for value in (before, now))
    if part == "teacher.weights" or not is_plain:
        return word
    before, now = as_yaml(before), as_yaml(now)
    if max(len(before), len(now)) > SHORT:
        return word
    return f"{word} ({before}, now {now})"


def references(asked: list[str]) -> list[str]:
    """Return what is asked of a teacher as references name it, behind its role.

    Args:
        asked: as an identity has it: JSON of a value's name and of keys in it.
    """
    found = []
    for text in asked:
        value, *keys = json.loads(text)
        path = value.partition(".")[2]
        found.append(".".join([path, *keys] if path else keys) or "output")
    return found
