"""The table at the end of a run: each stage's student over all seeds, and the gain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import mean, stdev

from distill.config.controlled import stages_that_differ
from distill.config.experiment import Experiment, Stage
from distill.observer import Numbers, StageResult


def summary_table(
    experiment: Experiment, results: Sequence[StageResult], no_fractions: Collection[str] = ()
) -> str:
    """Return the results as a Markdown table, one row a stage.

    The gain is the mean over seeds of the difference to the baseline stage with the same seed,
    for students of the same architecture; a spread is the standard deviation over seeds. Parts
    of a metric are left to the files.

    Args:
        experiment: the description.
        results: of every stage and seed.
        no_fractions: metrics that are not to be shown in percent.
    """
    names = dict.fromkeys(name for result in results for name in _numbers(result))
    metrics = [name for name in names if "/" not in name]
    show = {name: _plain if _is_one_of(name, no_fractions) else _percent for name in metrics}
    baseline = experiment.test.baseline if experiment.test else None
    header = ["stage", "student", "parameters", *metrics]
    header += [f"gain over {baseline}"] if baseline and metrics else []
    rows = [header]
    for stage in experiment.stages:
        own = _of(stage.name, results)
        if own:
            compared = _is_compared(experiment, stage)
            rows.append(_row(own, show, baseline, results, compared))
    return _markdown(rows)


READING = (
    "With a control, all is as with the teacher but for what it knows. Where a control gains as "
    "much as the method, that knowledge did not make the gain; it can have made no more than what "
    "the method is ahead by."
)


def control_table(
    experiment: Experiment,
    results: Sequence[StageResult],
    controls: Mapping[str, tuple[Experiment, Sequence[StageResult]]],
    no_fractions: Collection[str] = (),
) -> str:
    """Return what stages reach as they are and with controls, as a Markdown table.

    One row for each stage as it is that some control makes a difference to, and one for each such
    control. The gain of both is over the baseline stage of the experiment as it is; how far the
    method is ahead is the mean over seeds of the difference with the same seed.

    Args:
        experiment: the description.
        results: of every stage and seed.
        controls: the description and the results with each control, by its name.
        no_fractions: metrics that are not to be shown in percent.
    """
    metric = next((name for r in results for name in _numbers(r) if "/" not in name), None)
    if metric is None:
        return "nothing is measured, so there is nothing to compare"
    text = _plain if _is_one_of(metric, no_fractions) else _percent
    baseline = experiment.test.baseline if experiment.test else None
    gain = [f"gain over {baseline}"] if baseline is not None else []
    rows = [["stage", "teachers", metric, *gain, "method ahead by"]]
    for stage in experiment.stages:
        base = _of(baseline, results) if _is_compared(experiment, stage) else []
        own = _of(stage.name, results)
        given = {
            name: _of(stage.name, runs)
            for name, (other, runs) in controls.items()
            if stage.name in stages_that_differ(experiment, other)
        }
        for name, those in {"as in the file": own, **given}.items() if given else ():
            reached = text([_numbers(r)[metric] for r in those if metric in _numbers(r)])
            gained = [text(_differences(those, metric, base), sign="+")] if gain else []
            ahead = "" if those is own else text(_differences(own, metric, those), sign="+")
            rows.append([stage.name, name, reached, *gained, ahead])
    return _markdown(rows)


def _of(stage: str | None, results: Sequence[StageResult]) -> list[StageResult]:
    return [result for result in results if result.stage == stage]


def measured_on(experiment: Experiment) -> str:
    """Say in words what the table's numbers are measured on."""
    count = len(experiment.seeds)
    over = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed"
    if experiment.test is None:
        is_measured = any(stage.data.validate and stage.metrics for stage in experiment.stages)
        return f"on each stage's validation data, {over}" if is_measured else over
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
    show: Mapping[str, Callable[..., str]],
    baseline: str | None,
    results: Sequence[StageResult],
    is_compared: bool,
) -> list[str]:
    row = [own[0].stage, own[0].student, f"{own[0].parameters:,}"]
    row += [text([_numbers(r)[m] for r in own if m in _numbers(r)]) for m, text in show.items()]
    if baseline and show:
        metric, text = next(iter(show.items()))
        base = _of(baseline, results)
        row.append(text(_differences(own, metric, base), sign="+") if is_compared else "")
    return row


def _differences(
    own: Sequence[StageResult], metric: str, others: Sequence[StageResult]
) -> list[float]:
    """Return by how much each result is above the other one of the same seed."""
    base = {r.seed: _numbers(r) for r in others}
    return [
        _numbers(result)[metric] - base[result.seed][metric]
        for result in own
        if metric in base.get(result.seed, {}) and metric in _numbers(result)
    ]


def _numbers(result: StageResult) -> Numbers:
    return result.test or result.validation


def _percent(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values) * 100:.2f}" if len(values) > 1 else ""
    return f"{mean(values) * 100:{sign}.2f}{spread} %"


def _plain(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.4f}{spread}"


def _is_one_of(name: str, metrics: Collection[str]) -> bool:
    """Whether a measurement is of one of the metrics, whatever prefix and part its name has."""
    plain = name.partition("/")[0]
    return any(plain == metric or plain.endswith(f".{metric}") for metric in metrics)


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
