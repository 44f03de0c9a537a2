import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill.builtin.result_files import ResultFiles
from distill.observer import (
    EpochEnd,
    Position,
    RunEnd,
    RunStart,
    StageEnd,
    StageResult,
    StageStart,
    StepEnd,
)

ENVIRONMENT = {
    "started": "2026-01-01T00:00:00+00:00",
    "command": ["distill", "run", "my exp.yaml"],
    "python": "3.11.1",
    "platform": "Linux",
    "packages": {"torch": "2.10.0", "distill-core": "0.1.0"},
    "plugins": [
        {"name": "kd", "distribution": "distill-kd", "version": "0.3.0", "error": None},
        {"name": "mine.py", "distribution": "mine.py", "version": "", "error": None},
    ],
    "git": {"commit": "abc123", "changed": True},
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "gpu": None,
    "processes": 1,
}


def start(folder, **more):
    given = {"seeds": [1], "stages": ["a", "b"], "environment": ENVIRONMENT, **more}
    return RunStart("toy", folder, files={"experiment.yaml": "name: toy\n"}, **given)


def stage_start(seed, stage, epoch=0):
    at = Position(seed, stage, epoch, epoch * 2)
    return "stage_start", StageStart(at, "ab"[stage], 2, 2, "thin", 5, 5, {})


class Told(str):
    """A note that the report has too."""

    about = "store"

    def __new__(cls, text, report, rows=None):
        note = super().__new__(cls, text)
        note.report, note.rows = report, rows
        return note


def step(seed, stage, number):
    at = Position(seed, stage, (number - 1) // 2, number)
    return "step_end", StepEnd(at, "ab"[stage], 2, 2, {"total": 1.0}, 0.1, 10.0, 1.0)


def epoch(seed, stage, number):
    at = Position(seed, stage, number, number * 2)
    event = EpochEnd(at, "ab"[stage], 2, {"total": 1.0}, {"accuracy": 0.5}, 0.1, 1.0, 10.0, True)
    return "epoch_end", event


def stage_end(seed, stage):
    result = StageResult(seed, "ab"[stage], "thin", 5, 2, 2.0, test={"accuracy": 0.5})
    return "stage_end", StageEnd(Position(seed, stage + 1), result, [])


def whole_stage(seed, stage):
    steps = [step(seed, stage, number) for number in (1, 2, 3, 4)]
    first, second = epoch(seed, stage, 1), epoch(seed, stage, 2)
    begin, end = stage_start(seed, stage), stage_end(seed, stage)
    return [begin, *steps[:2], first, *steps[2:], second, end]


def record(event, events):
    observer = ResultFiles()
    observer.run_start(event)
    for name, content in events:
        getattr(observer, name)(content)
    observer.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def places(folder):
    keys = ("event", "seed", "stage", "epoch", "step")
    return [tuple(line[key] for key in keys) for line in lines(folder)]


def test_every_event_is_a_line_with_its_place(tmp_path):
    record(start(tmp_path), whole_stage(1, 0))
    assert places(tmp_path) == [
        ("stage_start", 1, "a", 0, 0),
        ("step", 1, "a", 0, 1),
        ("step", 1, "a", 0, 2),
        ("epoch", 1, "a", 1, 2),
        ("step", 1, "a", 1, 3),
        ("step", 1, "a", 1, 4),
        ("epoch", 1, "a", 2, 4),
        ("stage_end", 1, "a", 0, 0),
    ]
    assert lines(tmp_path)[3]["metrics"] == {"accuracy": 0.5}
    assert lines(tmp_path)[-1]["result"]["test"] == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "stopped",
    [
        Position(1, 0, 1),
        Position(1, 1, 0),
        Position(1, 1, 1),
        Position(1, 1, 2),
        Position(1, 2, 0),
    ],
)
def test_a_resumed_run_has_each_place_once_as_if_it_had_not_stopped(tmp_path, stopped):
    whole = whole_stage(1, 0) + whole_stage(1, 1)
    record(start(_folder(tmp_path, "straight")), whole)
    folder = _folder(tmp_path, "resumed")
    record(start(folder), whole)  # it went further than its last checkpoint
    rest = []
    for stage in range(stopped.stage, 2):
        done = stopped.epoch if stage == stopped.stage else 0
        events = whole_stage(1, stage)
        kept = [e for e in events if not _is_done(e, done)]
        rest += [stage_start(1, stage, done), *kept]
    record(start(folder, resumed={1: stopped}), rest)
    straight, resumed = places(tmp_path / "straight"), places(folder)
    without_starts = [place for place in straight if place[0] != "stage_start"]
    assert [place for place in resumed if place[0] != "stage_start"] == without_starts
    assert [p[2] for p in resumed if p[0] == "stage_start"] == ["a", "b"]


def _folder(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return folder


def _is_done(event, done):
    name, content = event
    if name == "stage_start":
        return True
    if name == "stage_end":
        return False
    epoch_of_it = content.position.epoch + (name == "step_end")
    return epoch_of_it <= done


def test_seeds_that_start_anew_lose_their_lines_and_others_keep_them(tmp_path):
    record(start(tmp_path, seeds=[1, 2]), whole_stage(1, 0) + whole_stage(2, 0))
    record(start(tmp_path, seeds=[1, 2], resumed={1: Position(1, 1)}), [])
    assert {line["seed"] for line in lines(tmp_path)} == {1}
    assert len(lines(tmp_path)) == 8


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    record(start(tmp_path), whole_stage(1, 0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epoch", "se')
    record(start(tmp_path, resumed={1: Position(1, 1)}), [])
    assert len(lines(tmp_path)) == 8


def test_metrics_are_never_gone_while_a_run_is_taken_up(tmp_path, monkeypatch):
    record(start(tmp_path), whole_stage(1, 0))
    before = (tmp_path / "metrics.jsonl").read_text()
    write = Path.write_text

    def crash(path, text, **more):
        if "metrics" in path.name:
            write(path, text[: len(text) // 2], **more)
            raise OSError("disk full")
        return write(path, text, **more)

    monkeypatch.setattr(Path, "write_text", crash)
    with pytest.raises(OSError, match="disk full"):
        record(start(tmp_path, resumed={1: Position(1, 1)}), [])
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_closing_before_the_start_does_nothing():
    ResultFiles().close()


def test_each_start_adds_its_environment(tmp_path):
    record(start(tmp_path), [])
    record(start(tmp_path), [])
    assert json.loads((tmp_path / "environment.json").read_text()) == [ENVIRONMENT, ENVIRONMENT]


def test_the_report_has_what_it_takes_to_repeat_and_use_the_run(tmp_path):
    folder = _folder(tmp_path, "my run")
    (folder / "b").mkdir()
    (folder / "b/last.safetensors").write_bytes(b"")
    result = stage_end(1, 1)[1].result
    record(start(folder), [("run_end", RunEnd([result], "| table |", "on val, one seed"))])
    report = (folder / "report.md").read_text()
    wanted = [
        "# toy\n",
        "| table |\n\nMeasured on val, one seed.",
        "distill run 'my exp.yaml'  # 2026-01-01T00:00:00+00:00",
        f"distill eval '{folder}'",
        "- `b/last.safetensors`",
        "torch==2.10.0\ndistill-core==0.1.0\ndistill-kd==0.3.0\n",
        "- Python: 3.11.1",
        "- device: cpu",
        "- git commit: abc123 with changes",
        "```yaml\nname: toy\n```",
    ]
    assert [text for text in wanted if text not in report] == []
    assert "mine.py==" not in report
    (stored,) = json.loads((folder / "results.json").read_text())
    assert stored["test"] == {"accuracy": 0.5}


def test_the_report_has_each_stage_s_speed_and_where_the_time_of_profiled_ones_went(tmp_path):
    known = {"samples_per_second": 1234.5, "teacher_share": 0.254, "peak_memory": 300 * 2**20}
    profile = {"backward": {"seconds": 0.0125, "share": 1.0}}
    results = [
        StageResult(1, "a", "thin", 5, 2, 2.0, peak_memory=2**20),
        StageResult(1, "b", "thin", 5, 2, 3600.25, profile=profile, **known),
    ]
    record(start(tmp_path), [("run_end", RunEnd(results, "| table |", "on val, one seed"))])
    report = (tmp_path / "report.md").read_text()
    speed = [
        "## Speed",
        "",
        "| stage |  training | samples/s | teachers' share of a step | peak memory |",
        "| ----- | --------: | --------: | ------------------------: | ----------: |",
        "| a     |     2.0 s |         – |                         – |       1 MiB |",
        "| b     | 3,600.2 s |     1,234 |                      25 % |     300 MiB |",
    ]
    assert "\n".join(speed) in report
    assert "what the process takes at most, with what" in report
    assert report.count("### Where the time of a step goes") == 1
    assert "goes: b, seed 1\n\n| part of a step |    median |   share |" in report
    assert "| backward       | 12.500 ms | 100.0 % |" in report
    assert "waited for the GPU" not in report


def with_notes(notes, seed=1, stage=0, epoch=0):
    name, event = stage_start(seed, stage, epoch)
    return name, replace(event, notes=notes)


def with_misfits(number, misfits):
    name, event = epoch(1, 0, number)
    return name, replace(event, misfits=misfits)


END = ("run_end", RunEnd([], "| table |", "on val, one seed"))


def test_the_report_says_what_was_stored_fast_and_in_memory(tmp_path):
    there = [1]
    store = Told("teacher's outputs: 1 of 40 are there", "teacher's outputs in x", lambda: there[0])
    begin = with_notes(
        [store, "a line for the console", Told("t is fast: KL 0", "t is fast: KL 0")]
    )

    observer = ResultFiles()
    observer.run_start(start(tmp_path))
    observer.stage_start(begin[1])
    there[0] = 31
    for name, event in [with_misfits(1, 2), with_misfits(2, 0), stage_end(1, 0), END]:
        getattr(observer, name)(event)
    observer.close()
    report = (tmp_path / "report.md").read_text()
    assert (
        "## Stored outputs, fast teachers, data in memory\n\n"
        "- a: teacher's outputs in x: 1 row there before, 30 computed\n"
        "- a: t is fast: KL 0\n"
        "- a: 2 rows of those did not fit and were computed, counted each epoch\n\n## Evaluation"
    ) in report
    assert "a line for the console" not in report


def test_rows_that_a_stopped_run_computed_before_count(tmp_path):
    there = [0]
    store = Told("stored", "stored", lambda: there[0])
    observer = ResultFiles()
    observer.run_start(start(tmp_path))
    observer.stage_start(with_notes([store])[1])
    observer.epoch_end(epoch(1, 0, 1)[1])
    observer.close()
    there[0] = 25
    record(
        start(tmp_path, resumed={1: Position(1, 0, 1)}),
        [with_notes([store], epoch=1), stage_end(1, 0), END],
    )
    report = (tmp_path / "report.md").read_text()
    assert "- a: stored: 0 rows there before, 25 computed" in report


def test_the_report_says_nothing_of_what_was_not_used(tmp_path):
    record(start(tmp_path), [*whole_stage(1, 0), END])
    report = (tmp_path / "report.md").read_text()
    assert "Stored outputs" not in report


def test_the_report_says_which_steps_were_measured(tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    for folder, profile in ((plain, {}), (profiled, {"step": {"seconds": 1.0, "share": 1.0}})):
        folder.mkdir()
        result = StageResult(1, "a", "thin", 5, 2, 2.0, profile=profile)
        record(start(folder), [("run_end", RunEnd([result], "| table |", "on val"))])
    report = (plain / "report.md").read_text()
    assert "share is measured on steps with a log line" in report
    assert "medians" not in report
    report = (profiled / "report.md").read_text()
    assert "share is measured on every step less up to three in front" in report
    assert "medians need not add up. Share: of all time. Measured: the" in report


def test_the_report_of_a_run_on_gpus_says_whose_memory_it_is_and_that_a_profile_waits(tmp_path):
    environment = {**ENVIRONMENT, "gpu": "H100", "processes": 2}
    profile = {"step": {"seconds": 0.0125, "share": 1.0}}
    results = [StageResult(seed, "a", "thin", 5, 2, 2.0, profile=profile) for seed in (1, 2)]
    event = start(tmp_path, seeds=[1, 2], environment=environment)
    record(event, [("run_end", RunEnd(results, "| table |", "on val, 2 seeds"))])
    report = (tmp_path / "report.md").read_text()
    assert "| stage | seed | training |" in report
    assert "what tensors take on the GPU at most, of the process that takes most" in report
    assert report.count("Each part waited for the GPU") == 2


def test_looking_at_a_finished_run_is_no_training_of_it(tmp_path):
    record(start(tmp_path), [*whole_stage(1, 0), END])
    finished = {1: Position(1, 2, 0)}
    later = {**ENVIRONMENT, "started": "later"}
    record(start(tmp_path, resumed=finished, environment=later), [END])
    assert "later" not in (tmp_path / "report.md").read_text()
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    record(start(tmp_path, resumed={1: Position(1, 0, 1)}, environment=later), [END])
    assert "later" in (tmp_path / "report.md").read_text()
