"""How fast a stage trained, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill import RunEnd, StageEnd

WITHOUT = "–"
WHOLE = {"step": "whole step"}


def speed_line(end: StageEnd) -> str:
    """Return a stage's speed in one line, without what is not known; empty if nothing is."""
    parts, result = [], end.result
    if result.samples_per_second:
        parts.append(f"{_number(result.samples_per_second)} samples/s")
    if result.teacher_share is not None:
        parts.append(f"teachers {_percent(result.teacher_share)} of a step")
    if result.peak_memory:
        parts.append(f"peak memory {_bytes(result.peak_memory)}")
    return ", ".join(parts)


def speed_table(end: RunEnd) -> str:
    """Return all stages' speed as a Markdown table."""
    seeds = len({result.seed for result in end.results}) > 1
    header = ["stage", *(["seed"] if seeds else [])]
    header += ["training", "samples/s", "teachers' share of a step", "peak memory"]
    rows = [
        [
            result.stage,
            *([str(result.seed)] if seeds else []),
            f"{result.seconds:,.1f} s",
            _number(result.samples_per_second) if result.samples_per_second else WITHOUT,
            WITHOUT if result.teacher_share is None else _percent(result.teacher_share),
            _bytes(result.peak_memory) if result.peak_memory else WITHOUT,
        ]
        for result in end.results
    ]
    return markdown([header, *rows])


def profile_table(profile: Mapping[str, Mapping[str, float]]) -> str:
    """Return where the time of a stage's steps went as a Markdown table."""
    rows = [
        [WHOLE.get(part, part), f"{1e3 * found['seconds']:,.3f} ms", _exact(found["share"])]
        for part, found in profile.items()
    ]
    return markdown([["part of a step", "median", "share"], *rows])


def profile_legend(*, gpu: bool) -> list[str]:
    """Say how to read that table, in sentences."""
    lines = [
        "Median: time in a step that has the part; medians need not add up. Share: of all time.",
        "Measured: the stage's steps since the run was last started, less up to three in front.",
    ]
    waits = "Each part waited for the GPU, so these steps took longer than others."
    return [*lines, waits] if gpu else lines


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the header, with all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _exact(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
