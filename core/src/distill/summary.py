"""The table at the end of a run: each stage's student over all seeds, and the gain."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from distill.config.experiment import Experiment, Stage
from distill.observer import Numbers, StageResult


def summary_table(experiment: Experiment, results: Sequence[StageResult]) -> str:
    """Return the results as a Markdown table, one row a stage.

    The gain is the mean over seeds of the difference to the baseline stage with the same seed,
    for students of the same architecture; a spread is the standard deviation over seeds.
    """
    metrics = list(dict.fromkeys(name for result in results for name in _numbers(result)))
    baseline = experiment.test.baseline if experiment.test else None
    header = ["stage", "student", "parameters", *metrics]
    header += [f"gain over {baseline}"] if baseline and metrics else []
    rows = [header]
    for stage in experiment.stages:
        own = [result for result in results if result.stage == stage.name]
        if own:
            compared = _is_compared(experiment, stage)
            rows.append(_row(own, metrics, baseline, results, compared))
    return _markdown(rows)


def measured_on(experiment: Experiment) -> str:
    """Say in words what the table's numbers are measured on."""
    count = len(experiment.seeds)
    over = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    if experiment.test is None:
        return f"on each stage's validation data, {over}"
    return f"on the data set '{experiment.test.dataset}', {over}"


def _is_compared(experiment: Experiment, stage: Stage) -> bool:
    """Whether a stage's student is of the baseline's architecture, so that they compare."""
    baseline = experiment.test.baseline if experiment.test else None
    students = {s.name: experiment.models[s.student.model].component for s in experiment.stages}
    if baseline is None or stage.name == baseline:
        return False
    own, other = students[stage.name], students[baseline]
    return (own.type, own.params) == (other.type, other.params)


def _row(
    own: Sequence[StageResult],
    metrics: Sequence[str],
    baseline: str | None,
    results: Sequence[StageResult],
    is_compared: bool,
) -> list[str]:
    row = [own[0].stage, own[0].student, f"{own[0].parameters:,}"]
    row += [_percent([_numbers(r)[m] for r in own if m in _numbers(r)]) for m in metrics]
    if baseline and metrics:
        row.append(_gain(own, metrics[0], baseline, results) if is_compared else "")
    return row


def _gain(
    own: Sequence[StageResult], metric: str, baseline: str, results: Sequence[StageResult]
) -> str:
    base = {r.seed: _numbers(r) for r in results if r.stage == baseline}
    differences = [
        _numbers(result)[metric] - base[result.seed][metric]
        for result in own
        if metric in base.get(result.seed, {}) and metric in _numbers(result)
    ]
    return _percent(differences, sign="+") if differences else ""


def _numbers(result: StageResult) -> Numbers:
    return result.test or result.validation


def _percent(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values) * 100:.2f}" if len(values) > 1 else ""
    return f"{mean(values) * 100:{sign}.2f}{spread} %"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = range(2, len(widths))

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number in numeric else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if n in numeric else "-" * w for n, w in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])
