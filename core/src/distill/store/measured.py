"""How good a store's teacher was found to be, kept beside its rows in ``measured.json``."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.store.rows import DIGEST, digest_of

MEASURED = "measured.json"


def find_measured(folder: Path, key: str) -> dict[str, float] | None:
    """Return what the teacher was measured as, ``None`` if it was not or the file is damaged.

    Args:
        folder: of the store.
        key: tells what it was measured on.
    """
    return (_read(folder) or {}).get(key)


def note_measured(folder: Path, key: str, numbers: Mapping[str, float]) -> None:
    """Keep what the teacher was measured as, unless the store may only be read."""
    file = folder / MEASURED
    measured = {**(_read(folder) or {}), key: dict(numbers)}
    temporary = file.with_name(f".{MEASURED}.{random.getrandbits(32):x}")
    try:
        temporary.write_text(json.dumps({**measured, DIGEST: digest_of(measured)}))
        temporary.replace(file)
    except OSError:  # as rows are not written there either, which is told
        return


def forget_damaged(folder: Path) -> bool:
    """Whether the file is damaged; if so it is removed, unless the store may only be read."""
    if _read(folder) is not None:
        return False
    with suppress(OSError):
        (folder / MEASURED).unlink()
    return True


def _read(folder: Path) -> dict[str, dict[str, float]] | None:
    """Return all that was noted, ``None`` if it is not what was written."""
    try:
        measured: dict[str, Any] = json.loads((folder / MEASURED).read_text())
        digest = measured.pop(DIGEST, None)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return measured if digest == digest_of(measured) else None
