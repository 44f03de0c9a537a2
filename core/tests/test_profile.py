"""Where the time of a step goes, by a clock that only the parts of a step move."""

import json

import pytest
import torch
from torch import nn

from distill import Batch, Observer, run
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.fast import FastTeacher
from distill.model.stored import Outputs, StoredRows
from distill.model.wiring import Address, Call
from distill.testing import toy_experiment, toy_registry
from distill.training import profile
from distill.training.checkpoint import load_state, save_state
from distill.training.loop import Loop
from distill.training.optimizer import Optimization
from distill.training.profile import Speed, StepClock, peak_memory
from distill.training.stage_outputs import StageOutputs
from distill.training.stored_stage import with_stored

CPU = torch.device("cpu")
DATA, TRANSFER, TEACHER, STUDENT, NECK, LOSS, BACKWARD, OPTIMIZER = 1, 2, 40, 20, 3, 4, 15, 5
MATCH = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
STEP = DATA + TRANSFER + TEACHER + STUDENT + NECK + LOSS + BACKWARD + OPTIMIZER


class Now:
    """The time, in seconds."""

    def __init__(self):
        self.seconds = 0.0
        self.read = 0

    def __call__(self):
        self.read += 1
        return self.seconds


@pytest.fixture
def now(monkeypatch):
    time = Now()
    monkeypatch.setattr(profile, "perf_counter", time)
    return time


class Slow(nn.Module):
    """Takes its time forward, and backward."""

    def __init__(self, now, forward, backward=0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.now, self.seconds, self.backward_seconds = now, forward, backward

    def forward(self, inputs):
        self.now.seconds += self.seconds
        output = inputs * self.weight
        if output.requires_grad:
            output.register_hook(self.backward_hook)
        return output

    def backward_hook(self, gradient):
        self.now.seconds += self.backward_seconds
        return gradient


class SlowLoss(Slow):
    def forward(self, neck, teacher):
        return super().forward((neck - teacher).square().mean())


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        self.now.seconds += OPTIMIZER
        return super().step(closure)


class SlowMixing:
    def __init__(self, now):
        self.now = now

    def __call__(self, batch, *_):
        self.now.seconds += TRANSFER
        return batch


def loop_of(now, *, log_every=2, profiles=False):
    student, teacher = Slow(now, STUDENT, BACKWARD), Slow(now, TEACHER).requires_grad_(False)
    neck = Call("neck", Slow(now, NECK), {"inputs": Address("student", "student")})
    wires = {"neck": Address("neck", "neck"), "teacher": Address("teacher", "teacher")}
    term = Call("match", SlowLoss(now, LOSS).requires_grad_(False), wires)
    distiller = Distiller(student, {"teacher": teacher}, [neck], Criterion([term], {"match": 1.0}))
    optimizer = SlowSGD(student.parameters(), lr=0.01)
    optimizer.now = now
    clock = StepClock(distiller, CPU, log_every, profiles)
    optimization = Optimization(optimizer)
    loop = Loop(distiller, optimization, CPU, 0, "kd", log_every, SlowMixing(now), clock=clock)
    return loop, distiller


def batches(now, count, accumulate=1):
    for number in range(count):
        now.seconds += DATA
        ends = (number + 1) % accumulate == 0
        yield Batch(torch.ones(2), torch.zeros(2), torch.arange(2), ends_step=ends)


def teachers_share(clock):
    return Speed().after(clock, CPU).share


def test_a_profile_has_each_part_of_a_step_as_they_come(now):
    loop, distiller = loop_of(now, profiles=True)
    loop.epoch(batches(now, 9), steps=9)
    found = loop.clock.profile()
    assert {part: numbers["seconds"] for part, numbers in found.items()} == {
        "data": DATA,
        "copy to device, batch transforms": TRANSFER,
        "forward of teacher": TEACHER,
        "forward of student": STUDENT,
        "auxiliary module neck": NECK,
        "loss match": LOSS,
        "backward": BACKWARD,
        "optimizer": OPTIMIZER,
        "rest (schedules, EMA, in between)": 0,
        "step": STEP,
    }
    assert list(found)[:4] == [
        "data",
        "copy to device, batch transforms",
        "forward of teacher",
        "forward of student",
    ]
    assert found["forward of teacher"]["share"] == pytest.approx(TEACHER / STEP)
    assert sum(n["share"] for part, n in found.items() if part != "step") == pytest.approx(1)
    assert loop.clock.timed == 9 - profile.WARM_UP
    assert distiller.timer is distiller.criterion.timer is None


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"in_memory": True}, "data: making batches from memory"),
        ({"workers": 1}, "data: waiting for workers"),
        ({"workers": 0}, "data: reading samples (no workers)"),
    ],
)
def test_a_profile_says_how_the_data_comes(tmp_path, data, part):
    data = {"train": "train", "validate": "val", "batch_size": 8, **data}
    experiment = toy_experiment(tmp_path, {"data": data})
    result = run(experiment, registry=toy_registry(), runs=tmp_path / "runs", profile=True)
    assert [name for name in result.stages[0].profile if name.startswith("data")] == [part]


FIND, DECODE, ENCODE = 7, 8, 9


def stored_loop(now, monkeypatch, *, full_from=0, **more):
    """Return a loop and its batches; the teacher's outputs are stored from a batch on."""
    loop, distiller = loop_of(now, **more)
    store = distiller.stores["teacher"] = StageOutputs(None, None, role="teacher")

    def find(self, batch, epoch, number):
        now.seconds += FIND
        missing = None if number >= full_from else torch.ones(2, dtype=torch.bool)
        return StoredRows(torch.zeros(2, 1), missing, torch.arange(2), torch.arange(2))

    def values(self, stored):
        now.seconds += DECODE
        return {"teacher": torch.ones(2)}

    def keep(self, stored, given):
        now.seconds += ENCODE
        return given

    for function in (find, values, keep):
        monkeypatch.setattr(Outputs, function.__name__, function)
    return loop, with_stored(batches(now, 9), {"teacher": store}, 0)


def test_reading_from_a_store_is_a_part_of_its_own_and_no_teacher_s(now, monkeypatch):
    loop, given = stored_loop(now, monkeypatch, profiles=True)
    loop.epoch(given, steps=9)
    found = {part: numbers["seconds"] for part, numbers in loop.clock.profile().items()}
    assert "forward of teacher" not in found
    assert found["stored outputs of teacher, read or written"] == FIND + DECODE
    assert found["data"] == DATA
    assert found["step"] == STEP - TEACHER + FIND + DECODE
    assert teachers_share(loop.clock) == 0


def test_writing_to_a_store_is_told_apart_from_the_teacher_s_forward(now, monkeypatch):
    loop, given = stored_loop(now, monkeypatch, full_from=9, profiles=True)
    loop.epoch(given, steps=9)
    found = {part: numbers["seconds"] for part, numbers in loop.clock.profile().items()}
    assert found["forward of teacher"] == TEACHER
    assert found["stored outputs of teacher, read or written"] == FIND + ENCODE
    assert teachers_share(loop.clock) == pytest.approx(TEACHER / (STEP + FIND + ENCODE))


@pytest.mark.parametrize(("full_from", "teacher"), [(0, 0), (9, TEACHER)])
def test_the_teachers_share_has_nothing_of_a_store_without_a_profile(
    now, monkeypatch, full_from, teacher
):
    loop, given = stored_loop(now, monkeypatch, full_from=full_from, log_every=4)
    loop.epoch(given, steps=9)
    whole = STEP - TEACHER + FIND + (teacher + ENCODE if teacher else DECODE)
    assert teachers_share(loop.clock) == pytest.approx(teacher / whole)


def test_parts_of_accumulated_batches_are_added_up(now):
    loop, _ = loop_of(now, profiles=True)
    loop.epoch(batches(now, 10, accumulate=2), steps=5)
    found = loop.clock.profile()
    assert found["forward of teacher"]["seconds"] == 2 * TEACHER
    assert found["optimizer"]["seconds"] == OPTIMIZER
    assert found["step"]["seconds"] == 2 * STEP - OPTIMIZER


def test_the_teachers_share_is_of_steps_with_a_log_line_and_others_are_not_looked_at(now):
    loop, distiller = loop_of(now, log_every=4)
    timers = []

    def after(step, followed):
        timers.append(loop.clock.timed)

    loop.epoch(batches(now, 10), steps=10, after_step=after)
    # Counted once the step is over, so behind the call.
    assert timers == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert teachers_share(loop.clock) == pytest.approx(TEACHER / STEP)
    assert loop.clock.profile() == {}
    assert distiller.timer is None


@pytest.mark.parametrize(
    ("log_every", "steps", "epochs", "timed"),
    [
        (1, 3, 1, 2),  # the first step of a stage is not like others
        (50, 5, 1, 1),  # no log line: the last one
        (50, 1, 1, 0),
        (50, 1, 3, 2),
        (3, 5, 2, 2),  # with a log line, the last one waits for nothing
    ],
)
def test_which_steps_are_timed(now, log_every, steps, epochs, timed):
    loop, _ = loop_of(now, log_every=log_every)
    for epoch in range(epochs):
        loop.epoch(batches(now, steps), epoch=epoch, first_step=epoch * steps, steps=steps)
    assert loop.clock.timed == timed


def test_a_step_that_is_not_timed_reads_no_clock(now):
    loop, _ = loop_of(now, log_every=50)
    loop.epoch(batches(now, 10), steps=20)
    assert now.read == 0


def test_log_lines_and_evaluations_are_no_part_of_a_step_but_schedules_are(now):
    loop, _ = loop_of(now, log_every=1, profiles=True)

    def log(progress):
        now.seconds += 1000

    def after(step, followed):
        now.seconds += 500 + 7
        return 500.0

    loop.epoch(batches(now, 9), steps=9, on_log=log, after_step=after)
    found = loop.clock.profile()
    assert found["rest (schedules, EMA, in between)"]["seconds"] == 7
    assert found["step"]["seconds"] == STEP + 7


def test_a_timed_step_waits_for_every_gpu_it_runs_on(now, monkeypatch):
    loop, distiller = loop_of(now, log_every=2)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    loop.clock.device = torch.device("cuda:0")
    teacher = distiller.models()["teacher"]
    there = torch.device("cuda:1")
    distiller.run_fast("teacher", lambda plain: FastTeacher(plain, None, CPU, CPU))
    object.__setattr__(distiller.fast["teacher"], "device", there)
    monkeypatch.setattr(FastTeacher, "__call__", lambda self, batch, pruned: teacher(batch.inputs))
    loop.epoch(batches(now, 3), steps=3)
    assert loop.clock.timed == 1
    assert set(waited) == {torch.device("cuda:0"), there}
    # Before the step, around the teacher, behind the optimizer, behind the log line, at the end.
    assert len(waited) == 2 * 6


def test_speed_goes_on_over_sessions(now):
    loop, _ = loop_of(now, log_every=1)
    loop.epoch(batches(now, 3), steps=3)
    before = Speed(samples=100, seconds=4.0, teachers=30.0, steps=60.0, memory=1 << 60)
    speed = before.after(loop.clock, CPU)
    assert speed.samples_per_second == 25
    assert speed.share == pytest.approx((30 + 2 * TEACHER) / (60 + 2 * STEP))
    assert speed.memory == 1 << 60
    assert Speed().samples_per_second == 0
    assert Speed().share is None


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory(CPU) < 2**50


class Stop(Observer):
    """Ends the run after its first epoch."""

    stops = True

    def epoch_end(self, event):
        if type(self).stops and event.position.epoch == 2:
            raise KeyboardInterrupt


def distillation(folder):
    kd = {
        "name": "kd",
        "teacher": {"model": "mlp"},
        "student": {"model": "wide"},
        "criterion": {"match": MATCH},
    }
    return toy_experiment(
        folder, {"name": "teach"}, kd, observers=["ResultFiles", "Stop"], log_every=1
    )


def run_in(folder, *, stops=False, **more):
    Stop.stops = stops
    registry = toy_registry(observers={"Stop": Stop})
    return run(distillation(folder), registry=registry, runs=folder / "runs", **more)


def test_a_run_tells_its_speed_and_only_a_profiled_one_its_parts(tmp_path):
    plain = run_in(tmp_path / "plain")
    teach, kd = plain.stages
    assert kd.samples_per_second * kd.seconds == pytest.approx(2 * 20)
    assert teach.teacher_share is None
    assert 0 < kd.teacher_share < 1
    assert kd.peak_memory > 0
    assert kd.profile == {}
    assert "Where the time" not in (plain.directory / "report.md").read_text()
    profiled = run_in(tmp_path / "profiled", profile=True)
    parts = profiled.stages[1].profile
    assert {"forward of teacher", "forward of student", "loss match", "step"} <= parts.keys()
    report = (profiled.directory / "report.md").read_text()
    assert "### Where the time of a step goes: kd, seed 0" in report
    assert "| loss match " in report


def test_to_profile_changes_no_result(tmp_path):
    plain, profiled = run_in(tmp_path / "plain"), run_in(tmp_path / "profiled", profile=True)
    for ours, theirs in zip(plain.stages, profiled.stages, strict=True):
        assert ours.validation == theirs.validation
    one, other = (r.student().state_dict() for r in (plain, profiled))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_s_speed_is_that_of_all_its_samples(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, stops=True)
    result = run_in(tmp_path)
    for stage in result.stages:
        assert stage.samples_per_second * stage.seconds == pytest.approx(2 * 20)
    stored = json.loads((result.directory / "results.json").read_text())
    assert stored[1]["teacher_share"] == result.stages[1].teacher_share


def test_a_checkpoint_without_speed_is_gone_on_from(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, stops=True)
    file = tmp_path / "runs" / "toy" / "checkpoint.pt"
    state = load_state(file)
    assert state.pop("speed")["samples"] == 20
    save_state(file, state)
    (teach, _) = run_in(tmp_path).stages
    assert teach.samples_per_second * teach.seconds > 20, "seconds of before count no samples"
