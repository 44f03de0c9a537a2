"""A run as files: metrics as JSON lines, environment, results and a report to read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill import (
    ControlsEnd,
    EpochEnd,
    EvaluationEnd,
    Observer,
    RunEnd,
    RunStart,
    StageEnd,
    StageStart,
    StepEnd,
)
from distill.builtin.speed import profile_legend, profile_table, speed_table

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
RESULTS = "results.json"
REPORT = "report.md"


class ResultFiles(Observer):
    """Writes into the run's folder."""

    def run_start(self, event: RunStart) -> None:
        """Take up the metrics where the run goes on, and note what it runs on."""
        self._start = event
        self._stores: dict[str, Callable[[], int]] = {}
        self._sessions = _read_sessions(event.directory)
        if not (self._sessions and _is_finished(event)):
            self._sessions.append(dict(event.environment))
        _write_json(event.directory / ENVIRONMENT, self._sessions)
        self._rows_before = _rows_before(event)
        _write(event.directory / METRICS, "".join(_still_valid(event)))
        self._metrics = (event.directory / METRICS).open("a", encoding="utf-8")

    def stage_start(self, event: StageStart) -> None:
        """Record the teachers' quality, and what is stored, fast or in memory."""
        seed = event.position.seed
        told: list[Any] = [note for note in event.notes if hasattr(note, "about")]
        self._stores = {note.report: note.rows for note in told if note.rows is not None}
        self._record(
            "stage_start",
            event,
            stage=event.name,
            teachers=event.teachers,
            options=[note.report for note in told],
            rows={**self._rows_now(), **self._rows_before.get((seed, event.name), {})},
        )

    def _rows_now(self) -> dict[str, int]:
        """Return how many rows there are now, by the line of a store."""
        return {line: rows() for line, rows in self._stores.items()}

    def step_end(self, event: StepEnd) -> None:
        """Record a log line."""
        self._record(
            "step",
            event,
            stage=event.stage,
            losses=event.losses,
            lr=event.lr,
            samples_per_second=event.samples_per_second,
            weights=event.weights,
            **({"term_gradients": vars(event.term_gradients)} if event.term_gradients else {}),
        )

    def evaluation_end(self, event: EvaluationEnd) -> None:
        """Record a measurement in the middle of an epoch."""
        self._record(
            "evaluation", event, stage=event.stage, metrics=event.metrics, is_best=event.is_best
        )

    def epoch_end(self, event: EpochEnd) -> None:
        """Record an epoch."""
        self._record(
            "epoch",
            event,
            stage=event.stage,
            losses=event.losses,
            metrics=event.metrics,
            lr=event.lr,
            seconds=event.seconds,
            samples_per_second=event.samples_per_second,
            is_best=event.is_best,
            skipped={str(index): why for index, why in event.skipped.items()},
            overflows=event.overflows,
            misfits=event.misfits,
        )
        self._metrics.flush()

    def stage_end(self, event: StageEnd) -> None:
        """Record the stage's result."""
        result = vars(event.result)
        self._record(
            "stage_end", event, stage=event.result.stage, result=result, rows=self._rows_now()
        )
        self._metrics.flush()

    def run_end(self, event: RunEnd) -> None:
        """Write results and report."""
        self._end = event
        results = [vars(result) for result in event.results]
        _write_json(self._start.directory / RESULTS, results)
        self._metrics.flush()
        report = _report(self._start, event, self._sessions)
        _write(self._start.directory / REPORT, report)

    def controls_end(self, event: ControlsEnd) -> None:
        """Write the report again, with the comparison."""
        report = _report(self._start, self._end, self._sessions, event)
        _write(self._start.directory / REPORT, report)

    def close(self) -> None:
        """Close the metrics."""
        if hasattr(self, "_metrics"):
            self._metrics.close()

    def _record(self, kind: str, event: Any, **values: Any) -> None:
        position = event.position
        line = {
            "event": kind,
            "seed": position.seed,
            "stage_number": position.stage,
            "epoch": position.epoch,
            "step": position.step,
            **values,
        }
        self._metrics.write(json.dumps(line) + "\n")


def _is_finished(event: RunStart) -> bool:
    """Whether all there is to train has been trained before."""
    done = [seed for seed, place in event.resumed.items() if place.stage == len(event.stages)]
    return len(done) == len(event.seeds)


def _still_valid(event: RunStart) -> list[str]:
    """Return the recorded lines up to where each seed goes on; what came later is done again."""
    file = event.directory / METRICS
    if not file.exists():
        return []
    lines = file.read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and _is_before(event, json.loads(line))]


def _rows_before(event: RunStart) -> dict[tuple[int, str], dict[str, int]]:
    """Return how many rows stores had when the stages began that the run is in the middle of."""
    file, found = event.directory / METRICS, {}
    text = file.read_text("utf-8") if event.resumed and file.exists() else ""
    for written in text.splitlines(keepends=True):
        line = json.loads(written) if written.endswith("\n") else {}
        position = event.resumed.get(line.get("seed", -1))
        if line.get("event") != "stage_start" or position is None or not position.epoch:
            continue
        if line["stage_number"] == position.stage:
            found[line["seed"], line["stage"]] = line.get("rows", {})
    return found


def _is_before(event: RunStart, line: Mapping[str, Any]) -> bool:
    if line["seed"] not in event.resumed:
        return False
    position = event.resumed[line["seed"]]
    place, goes_on = (line["stage_number"], line["epoch"]), (position.stage, position.epoch)
    if line["event"] == "stage_start":
        return bool(place[0] < goes_on[0])
    return bool(place <= goes_on if line["event"] in ("epoch", "stage_end") else place < goes_on)


def _read_sessions(directory: Path) -> list[dict[str, Any]]:
    file = directory / ENVIRONMENT
    try:
        return list(json.loads(file.read_text("utf-8"))) if file.exists() else []
    except ValueError:  # cut off by a kill: it holds nothing that results depend on
        return []


def _write_json(file: Path, content: Any) -> None:
    _write(file, json.dumps(content, indent=2) + "\n")


def _write(file: Path, text: str) -> None:
    """Replace what the file holds, which a crash meanwhile leaves as it was."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _report(
    start: RunStart,
    end: RunEnd,
    sessions: list[dict[str, Any]],
    controls: ControlsEnd | None = None,
) -> str:
    environment = sessions[-1]
    folder = start.directory
    inner = {file.parent for file in folder.glob("*/resolved.yaml")}  # runs with controls
    files = [file for file in folder.rglob("*.safetensors") if inner.isdisjoint(file.parents)]
    students = sorted(file.relative_to(folder) for file in files)
    packages = {**environment["packages"]}
    packages.update({p["distribution"]: p["version"] for p in environment["plugins"]})
    sections = [
        f"# {start.name}",
        f"## Results\n\n{end.table}\n\nMeasured {end.measured_on}.",
        *([_comparison(folder, controls)] if controls is not None else []),
        "## Training\n\n" + _code("\n".join(_command(session) for session in sessions)),
        "## Speed\n\n" + _speed(end, environment),
        *(
            f"### Where the time of a step goes: {result.stage}, seed {result.seed}\n\n"
            + _profile(result.profile, environment)
            for result in end.results
            if result.profile
        ),
        *_options(folder / METRICS, len({result.seed for result in end.results}) > 1),
        "## Evaluation\n\n" + _code(_evaluation(folder, environment["command"])),
        "## Trained students\n\nEach model alone, for `load_state_dict(strict=True)`:\n\n"
        + "\n".join(f"- `{file}`" for file in students),
        "## Dependencies\n\n" + _code("\n".join(f"{k}=={v}" for k, v in packages.items() if v)),
        "## Environment\n\n" + "\n".join(_facts(environment)),
        "## Experiment file\n\n" + _code(start.files["experiment.yaml"].rstrip(), "yaml"),
    ]
    return "\n\n".join(sections) + "\n"


def _options(metrics: Path, seeds: bool) -> list[str]:
    """Return the section on what was stored, fast or in memory; none if nothing was."""
    stages: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for text in metrics.read_text("utf-8").splitlines():
        line = json.loads(text)
        stages.setdefault((line["seed"], line["stage"]), []).append(line)
    found: list[str] = []
    for (seed, stage), lines in stages.items():
        where = f", seed {seed}" if seeds else ""
        found += [f"- {stage}{where}: {told}" for told in _options_of(lines)]
    title = "## Stored outputs, fast teachers, data in memory"
    return [f"{title}\n\n" + "\n".join(found)] if found else []


def _options_of(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each of a stage's; of rows those of all sessions together are counted."""
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    options: dict[str, None] = {}
    misfits = 0
    for line in lines:
        options.update(dict.fromkeys(line.get("options", ())))
        after.update(line.get("rows", {}))
        before = {**line.get("rows", {}), **before}
        misfits += line.get("misfits", 0)
    told = [
        f"{text}: {_rows(before[text])} there before, {after[text] - before[text]:,} computed"
        if text in before
        else text
        for text in options
    ]
    if misfits:
        told.append(f"{_rows(misfits)} of those did not fit and were computed, counted each epoch")
    return told


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def _speed(end: RunEnd, environment: Mapping[str, Any]) -> str:
    memory = "what tensors take on the GPU" if environment["gpu"] else "what the process takes"
    processes = ", of the process that takes most" if environment["processes"] > 1 else ""
    is_profiled = any(result.profile for result in end.results)
    steps = "every step less up to three in front" if is_profiled else "steps with a log line"
    return (
        f"{speed_table(end)}\n\nTraining is without measuring; samples are those of all "
        f"processes. The teachers' share is measured on {steps}. Peak memory is "
        f"{memory} at most{processes}, with what stages before have left."
    )


def _profile(profile: Mapping[str, Mapping[str, float]], environment: Mapping[str, Any]) -> str:
    legend = " ".join(profile_legend(gpu=bool(environment["gpu"])))
    return f"{profile_table(profile)}\n\n{legend}"


def _comparison(folder: Path, controls: ControlsEnd) -> str:
    runs = "\n".join(
        f"- {name}: `{directory.relative_to(folder)}/report.md`"
        for name, directory in controls.directories.items()
    )
    table = f"{controls.table}\n\nMeasured {controls.measured_on}. {controls.reading}"
    return f"## Controls\n\n{table}\n\n{runs}"


def _evaluation(folder: Path, command: list[str]) -> str:
    """Return the command that measures the last student, with the local plugins of the run."""
    flags = ("-p", "--plugin")
    files = [after for before, after in pairwise(command) if before in flags]
    return shlex.join(["distill", "eval", str(folder), *(f"--plugin={file}" for file in files)])


def _command(session: Mapping[str, Any]) -> str:
    return f"{shlex.join(session['command'])}  # {session['started']}"


def _facts(environment: Mapping[str, Any]) -> list[str]:
    git = environment["git"]
    commit = f"{git['commit']}{' with changes' if git['changed'] else ''}" if git else "none"
    facts = {
        "Python": environment["python"],
        "platform": environment["platform"],
        "device": environment["gpu"] or environment["device"],
        "cores and threads": f"{environment['cores']}, {environment['threads']}",
        "processes": environment["processes"],
        "git commit": commit,
    }
    return [f"- {name}: {value}" for name, value in facts.items()]


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"
