"""Write core's index of what the project's plugins bring: python tests/known_components.py."""

from __future__ import annotations

import json
from pathlib import Path

from distill import plugins

INDEX = Path(__file__).parents[1] / "core/src/distill/known_components.json"


def offered() -> dict[str, dict[str, list[str]]]:
    """Return distribution -> kind -> names of every installed plugin but core."""
    return {
        record.distribution: {kind: sorted(names) for kind, names in record.components.items()}
        for record in plugins().records
        if record.distribution.startswith("distill-") and record.distribution != "distill-core"
    }


if __name__ == "__main__":
    INDEX.write_text(json.dumps(offered(), indent=1) + "\n", "utf-8")
