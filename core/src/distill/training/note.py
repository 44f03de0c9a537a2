"""A line that a person should know of a stage, and what it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

About = Literal["store", "fast", "memory"]


class Note(str):
    """A line among a stage's notes that the report of a run has too.

    Attributes:
        about: what it is about.
        report: what the report says of it.
        rows: of a store, how many of its rows are there whenever it is asked.
    """

    about: About
    report: str
    rows: Callable[[], int] | None

    def __new__(
        cls, text: str, about: About, report: str = "", rows: Callable[[], int] | None = None
    ) -> Note:
        """Return the line."""
        note = super().__new__(cls, text)
        note.about, note.report, note.rows = about, report or text, rows
        return note


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 sample``, ``2 samples``, ``3 batches``."""
    ending = "es" if noun.endswith(("ch", "ss")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"
