"""The comparison of methods as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """What is told of a method.

    Attributes:
        name: of the method.
        accuracies: of its student, by seed.
        ratio: of its step's time to KD's, if measured.
        memory: bytes.
    """

    name: str
    accuracies: Sequence[float]
    ratio: float | None
    memory: int


def write_report(
    folder: Path,
    data: str,
    rows: Sequence[Row],
    alone: Sequence[float],
    teacher: Sequence[float],
    failed: Mapping[str, str],
) -> None:
    """Write ``methods-<data>.md`` and ``.png``, and print the former."""
    ordered = sorted(rows, key=lambda row: -mean(row.accuracies))
    folder.mkdir(parents=True, exist_ok=True)
    text = table(ordered, alone, teacher, failed)
    (folder / f"methods-{data}.md").write_text(text, "utf-8")
    plot(ordered, alone).savefig(folder / f"methods-{data}.png", dpi=120)
    print(f"\n{text}\nwritten to {folder}")


def table(
    rows: Sequence[Row],
    alone: Sequence[float],
    teacher: Sequence[float],
    failed: Mapping[str, str],
) -> str:
    """Return the comparison in Markdown, the best first."""
    lines = [
        "| method | accuracy | gain over alone | step, of KD's | peak memory |",
        "| ------ | -------: | --------------: | ------------: | ----------: |",
    ]
    for row in rows:
        gains = [own - plain for own, plain in zip(row.accuracies, alone, strict=True)]
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        lines.append(
            f"| {row.name} | {percent(row.accuracies)} | {percent(gains, '+')} | {ratio} "
            f"| {row.memory / 2**20:,.0f} MiB |"
        )
    lines.append(f"| student alone | {percent(alone)} | | | |")
    if teacher:
        lines.append(f"| teacher | {percent(teacher)} | | | |")
    lines += [f"\n{name} failed:\n\n```\n{text}\n```" for name, text in failed.items()]
    return "\n".join(lines) + "\n"


def percent(values: Sequence[float], sign: str = "") -> str:
    """Return mean and standard deviation of fractions in points."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):{sign}.1f}{spread}"


def plot(rows: Sequence[Row], alone: Sequence[float]) -> Figure:
    """Return accuracies as dots with bars of a standard deviation, the best on top."""
    figure = Figure(figsize=(7, 1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row.name for row in reversed(rows)]
    means = [100 * mean(row.accuracies) for row in reversed(rows)]
    spreads = [
        100 * stdev(row.accuracies) if len(row.accuracies) > 1 else 0.0 for row in reversed(rows)
    ]
    axes.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", capsize=3, color="tab:blue")
    axes.axvline(100 * mean(alone), color="tab:gray", linestyle="--")
    axes.text(100 * mean(alone), len(rows) - 0.3, " student alone", color="tab:gray")
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(-0.7, len(rows) + 0.2)
    axes.set_xlabel("accuracy on test data, %")
    axes.grid(axis="x", alpha=0.3)
    return figure
