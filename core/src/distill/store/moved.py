"""A store that was made for the same data in another place.

What a store belongs to names the folders and files that a data set is read from. Rows prove
themselves by their inputs, wherever these come from, so a store made for a data set elsewhere may
be used. Whether that is the same one is told by some of its samples, lest two that only look alike
in the file overwrite each other's rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import StorageError
from distill.store.rows import META, read_meta

SEEN = "seen"
"""What ``meta.json`` calls fingerprints of some samples."""
NAMING = ("component", "wrappers")
"""What of a data set's description says where it lies."""
Place = tuple[str, str]
"""Where something was, and where it is now."""


def find_moved(
    stores: Path, identity: Mapping[str, Any], seen: Callable[[], Sequence[int]]
) -> tuple[Path, Sequence[Place]] | None:
    """Find a store that differs from one that is not there only in where the data were.

    Args:
        stores: the folder.
        identity: of the store that is not there.
        seen: returns fingerprints of some samples; it is called only if there is a candidate.

    Returns:
        The one used last, and from where to where the data were moved.
    """
    if identity["data"].get("collate") is not None:
        return None  # it may put into a batch what no row's fingerprint is of
    wanted, now = _rest(identity), list[int]()
    for folder, meta in _last_used_first(stores):
        before = meta.get("identity")
        if not isinstance(before, Mapping) or _rest(before) != wanted or not meta.get(SEEN):
            continue
        places = moved_places(before, identity)
        if not places:
            continue
        now = now or list(seen())
        if any(now) and meta[SEEN] == now:
            return folder, places
    return None


def _last_used_first(stores: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    found = []
    for folder in stores.iterdir() if stores.is_dir() and os.access(stores, os.R_OK) else ():
        if folder.name.startswith("."):
            continue
        try:
            found.append(((folder / META).stat().st_mtime, folder.name, folder, read_meta(folder)))
        except (StorageError, OSError):
            continue  # damaged, of another version, or no store at all
    for _, _, folder, meta in sorted(found, key=lambda one: one[:2], reverse=True):
        yield folder, meta


def _rest(identity: Mapping[str, Any]) -> str:
    """Return all of an identity but what names the data set's places."""
    data = identity.get("data")
    others = (
        {k: v for k, v in data.items() if k not in NAMING} if isinstance(data, Mapping) else data
    )
    return json.dumps({**identity, "data": others}, sort_keys=True, default=str)


def moved_places(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Place]:
    """Return from where to where a data set was moved, if it is the same in all else.

    Args:
        before: an identity.
        now: another one, of the same form.

    Returns:
        Pairs of paths; empty if the two differ in more than paths, or in nothing.
    """
    found = list(_differing(_naming(before), _naming(now)))
    if any(place is None for place in found):
        return []
    return list(dict.fromkeys(place for place in found if place is not None))


def _naming(identity: Mapping[str, Any]) -> Any:
    """Return, as it is read from a file, what names the data set."""
    data = identity.get("data")
    named = {key: data.get(key) for key in NAMING} if isinstance(data, Mapping) else None
    return json.loads(json.dumps(named, default=str))


def _differing(before: Any, now: Any) -> Iterator[Place | None]:
    """Yield places that differ, and ``None`` for anything else that does."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.keys() == now.keys():
        for key in before:
            yield from _differing(before[key], now[key])
    elif (
        isinstance(before, (list, tuple))
        and isinstance(now, (list, tuple))
        and len(before) == len(now)
    ):
        for one, other in zip(before, now, strict=True):
            yield from _differing(one, other)
    elif before != now:
        are_texts = isinstance(before, str) and isinstance(now, str)
        yield (before, now) if are_texts and _is_place(now) else None


def _is_place(text: str) -> bool:
    """Whether a parameter names a folder or file: it looks like a path, or one is there."""
    try:
        return os.sep in text or "/" in text or text.startswith("~") or Path(text).exists()
    except (OSError, ValueError):  # longer than a path may be, or not text that one could be
        return False
