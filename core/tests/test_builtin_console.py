import io
from dataclasses import replace
from pathlib import Path

import pytest

from distill.builtin import console
from distill.builtin.console import Console
from distill.observer import (
    EpochEnd,
    EvaluationEnd,
    Position,
    RunEnd,
    RunStart,
    StageEnd,
    StageResult,
    StageStart,
    StepEnd,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_start(**more):
    given = {"seeds": [1], "stages": ["kd"], "environment": {"device": "cpu"}, "files": {}, **more}
    return RunStart("toy", Path("runs/toy"), **given)


def step_end(step=3, losses=None, seconds=75.0):
    losses = losses or {"ce": 0.5, "total": 0.5}
    return StepEnd(Position(1, 0, 0, step), "kd", 2, 10, losses, 0.1, 1234.5, seconds)


def epoch_end(epoch=1, metrics=None, **more):
    given = {"is_best": False, "losses": {"ce": 0.25, "total": 0.25}, **more}
    return EpochEnd(
        Position(1, 0, epoch, 10 * epoch),
        "kd",
        2,
        metrics=metrics or {},
        lr=0.05,
        seconds=3.21,
        samples_per_second=1000.4,
        **given,
    )


def printed(*events, stream=None, **start):
    """What the console prints for the events after the start of a run."""
    stream = stream or io.StringIO()
    observer = Console(stream)
    observer.run_start(run_start(**start))
    for name, event in events:
        getattr(observer, name)(event)
    return stream.getvalue()


def test_a_run_begins_with_what_runs_where():
    assert printed() == "toy: 1 stage, 1 seed, cpu -> runs/toy\n"
    text = printed(
        seeds=[1, 2], stages=["a", "b"], environment={"device": "cuda:0", "processes": 2}
    )
    assert text == "toy: 2 stages, 2 seeds, cuda:0, 2 processes -> runs/toy\n"


def test_a_run_that_goes_on_says_where():
    resumed = {1: Position(1, 1), 2: Position(2, 0, 4)}
    text = printed(seeds=[1, 2], resumed=resumed)
    assert text.splitlines()[1:] == [
        "seed 1 is complete",
        "seed 2 goes on in stage kd after epoch 4",
    ]


@pytest.mark.parametrize(
    ("epochs", "steps", "said"),
    [(1, 1, "1 epoch of 1 step"), (15, 1200, "15 epochs of 1,200 steps")],
)
def test_a_stage_names_student_teachers_and_notes(epochs, steps, said):
    teachers = {"teacher": {"accuracy": 0.9123}, "other": {}}
    start = StageStart(
        Position(1, 0), "kd", epochs, steps, "thin", 1234567, 1000, teachers, ["a note"]
    )
    text = printed(("stage_start", start))
    assert text.splitlines()[1:] == [
        "",
        f"stage kd: thin (1,234,567 parameters, 1,000 trained), {said}",
        "  teacher: accuracy 0.9123",
        "  other: not measured: the stage has no validation data, or no metric for it",
        "  note: a note",
    ]
    assert "seed 1, stage kd:" in printed(("stage_start", start), seeds=[1, 2])


def test_an_epoch_is_one_line():
    first, second = printed(
        ("epoch_end", epoch_end(metrics={"accuracy": 0.5}, is_best=True)),
        ("epoch_end", epoch_end(2, {"accuracy": 0.75}, is_best=True)),
    ).splitlines()[1:]
    assert first == "  epoch 1/2  ce 0.25  lr 0.05  1,000 samples/s  3.2 s  accuracy 0.5000"
    assert second.endswith("lr 0.05  1,000 samples/s  3.2 s  accuracy 0.7500  best")
    assert "accuracy" not in printed(("epoch_end", epoch_end()))


def test_many_metrics_take_a_line_each_data_set_and_parts_are_left_to_the_files():
    metrics = {"a": 0.1, "b": 0.2, "c/cat": 0.3, "c": 0.4, "ema.a": 0.5, "ema.b": 0.6}
    lines = printed(("epoch_end", epoch_end(metrics=metrics))).splitlines()[2:]
    assert lines == ["    a 0.1000 b 0.2000 c 0.4000", "    ema.a 0.5000 ema.b 0.6000"]


def test_what_is_measured_within_an_epoch_is_a_line_with_its_step():
    event = EvaluationEnd(Position(1, 0, 0, 1500), "kd", {"accuracy": 0.5}, True)
    text = printed(("evaluation_end", event)).splitlines()[1]
    assert text == "  step 1,500  accuracy 0.5000  best"


def test_skipped_samples_and_steps_are_told_after_their_epoch():
    skipped = {17: "sample 17 cannot be read", 40: "sample 40 cannot be read"}
    lines = printed(("epoch_end", epoch_end(skipped=skipped, overflows=1))).splitlines()[2:]
    assert lines == [
        "    1 step left out: the gradient overflowed fp16, the scale is lowered",
        "    2 samples skipped, e.g. 17: sample 17 cannot be read",
    ]


def test_a_reason_is_told_once_and_samples_skipped_again_are_counted():
    torn = {number: f"sample {number} cannot be read" for number in (17, 40, 41, 50)}
    epochs = ([17], [17], [], [40, 17, 41], [17, 41], [50])
    skipped = [{number: torn[number] for number in numbers} for numbers in epochs]
    events = [("epoch_end", epoch_end(1 + n, skipped=each)) for n, each in enumerate(skipped)]
    told = [line.strip() for line in printed(*events).splitlines() if "skipped" in line]
    assert told == [
        "1 sample skipped, e.g. 17: sample 17 cannot be read",
        "1 sample skipped, the same as before",
        "3 samples skipped, 2 of them new, e.g. 40: sample 40 cannot be read",
        "2 samples skipped, the same as before",
        "1 sample skipped, e.g. 50: sample 50 cannot be read",
    ]


@pytest.mark.parametrize("other", [Position(1, 1, 1, 10), Position(2, 0, 1, 10)])
def test_samples_of_another_stage_or_seed_are_told_by_themselves(other):
    first = epoch_end(skipped={17: "sample 17 of a"})
    second = replace(first, position=other, skipped={17: "sample 17 of b"})
    text = printed(("epoch_end", first), ("epoch_end", second))
    assert "1 sample skipped, e.g. 17: sample 17 of b" in text


def test_the_total_is_shown_where_there_are_several_terms():
    losses = {"ce": 1.0, "kd": 2.0, "total": 3.0}
    assert "ce 1 kd 2 total 3" in printed(("epoch_end", epoch_end(losses=losses)))


def test_without_a_terminal_steps_are_lines_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    stream = io.StringIO()
    observer = Console(stream)
    for seconds in (10, 29, 31, 40, 62):
        now[0] = seconds
        observer.step_end(step_end(step=seconds % 10))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "  epoch 1/2 step 1/10  ce 0.5  1,234 samples/s  1:15 left",
        "  epoch 1/2 step 2/10  ce 0.5  1,234 samples/s  1:15 left",
    ]
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_a_line_moves_and_gives_way_to_the_next_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    long, short = step_end(losses={"a_long_name": 1.0, "total": 1.0}), step_end(step=4)
    text = printed(("step_end", long), ("step_end", short), stream=Terminal())
    _, first, second = text.split("\n")[1].split("\r")
    assert len(second) >= len(first), "what is left of a longer line must be covered"
    text = printed(("step_end", long), ("epoch_end", epoch_end()), stream=Terminal())
    blank = "\r" + " " * len(first) + "\r"
    assert f"{blank}  epoch 1/2  ce 0.25" in text


def test_a_moving_line_is_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = printed(("step_end", step_end()), stream=Terminal())
    assert len(text.split("\r")[1]) == 39


def test_closing_leaves_the_cursor_at_the_start_of_a_line():
    stream = Terminal()
    observer = Console(stream)
    observer.step_end(step_end())
    observer.close()
    assert stream.getvalue().endswith("\r\n")
    plain = io.StringIO()
    Console(plain).close()
    assert plain.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (36061, "10:01:01")],
)
def test_time_left_is_in_hours_minutes_and_seconds(monkeypatch, seconds, said):
    monkeypatch.setenv("COLUMNS", "200")
    text = printed(("step_end", step_end(seconds=seconds)), stream=Terminal())
    assert f"  {said} left" in text


def test_a_stage_and_a_run_end_with_their_results():
    result = StageResult(1, "kd", "thin", 10, 2, 3.0, test={"accuracy": 0.5})
    files = [Path("runs/toy/kd/last.safetensors")]
    text = printed(
        ("stage_end", StageEnd(Position(1, 1), result, files)),
        ("run_end", RunEnd([result], "| table |", "on val, one seed")),
    )
    assert text.splitlines()[1:] == [
        "  test: accuracy 0.5000",
        "  student: runs/toy/kd/last.safetensors",
        "",
        "| table |",
        "(on val, one seed)",
    ]


PROFILE = {
    "forward of teacher": {"seconds": 0.0125, "share": 0.25},
    "step": {"seconds": 0.05, "share": 1.0},
}


def test_a_stage_ends_with_its_speed_and_where_its_time_went():
    known = {"samples_per_second": 1234.5, "teacher_share": 0.254, "peak_memory": 3 * 2**29}
    result = StageResult(1, "kd", "thin", 10, 2, 3.0, profile=PROFILE, **known)
    text = printed(("stage_end", StageEnd(Position(1, 1), result, [Path("last.safetensors")])))
    assert text.splitlines()[1:] == [
        "  speed: 1,234 samples/s, teachers 25 % of a step, peak memory 1.50 GiB",
        "  | part of a step     |    median |   share |",
        "  | ------------------ | --------: | ------: |",
        "  | forward of teacher | 12.500 ms |  25.0 % |",
        "  | whole step         | 50.000 ms | 100.0 % |",
        "  Median: time in a step that has the part; medians need not add up. Share: of all time.",
        "  Measured: the stage's steps since the run was last started, less up to three in front.",
        "  student: last.safetensors",
    ]
    slow = StageResult(1, "kd", "thin", 10, 2, 3.0, samples_per_second=2.345)
    text = printed(("stage_end", StageEnd(Position(1, 1), slow, [Path("last.safetensors")])))
    assert "  speed: 2.35 samples/s\n" in text


def test_a_profile_of_a_gpu_says_that_its_parts_waited():
    result = StageResult(1, "kd", "thin", 10, 2, 3.0, profile=PROFILE)
    event = ("stage_end", StageEnd(Position(1, 1), result, [Path("last.safetensors")]))
    assert "waited for the GPU" not in printed(event)
    assert "Each part waited for the GPU" in printed(event, environment={"gpu": "H100"})


def test_a_run_begins_with_what_is_to_be_known_of_it():
    assert printed(notes=["look out"]).splitlines()[-1] == "note: look out"
