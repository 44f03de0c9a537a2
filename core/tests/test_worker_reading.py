"""Which sample each loader worker is reading."""

import os

import pytest

from distill.data import worker_reading
from distill.data.worker_reading import IDLE, Reading

KILLED = "DataLoader worker (pid 42) is killed by signal: Killed. "
EXITED = "DataLoader worker (pid(s) 41, 42) exited unexpectedly"
LATE = "DataLoader timed out after 5 seconds"
HINT = "; the system kills workers that need too much memory: fewer data.workers need less"


class Worker:
    def __init__(self, number):
        self.id = number


def reading_of(*rows):
    reading = Reading(len(rows))
    for number, row in enumerate(rows):
        reading.rows.numpy()[number] = (*row, 0)[:3]
    return reading


def test_a_worker_notes_in_its_own_row_what_it_reads(monkeypatch):
    reading = Reading(2)
    assert reading.rows.is_shared()
    monkeypatch.setattr(worker_reading, "get_worker_info", lambda: Worker(1))
    reading.note(7)
    assert reading.rows.tolist() == [[IDLE, IDLE, IDLE], [os.getpid(), 7, 0]]
    reading.note(5, 3)
    assert reading.rows.tolist() == [[IDLE, IDLE, IDLE], [os.getpid(), 5, 3]]
    reading.note(IDLE)
    assert reading.rows.tolist() == [[IDLE, IDLE, IDLE], [os.getpid(), IDLE, 0]]


def test_without_workers_nothing_is_noted():
    reading = Reading(0)
    reading.note(7)
    assert reading.rows.numel() == 0


@pytest.mark.parametrize(
    ("error", "rows", "said"),
    [
        (KILLED, [(41, 3), (42, 5)], " reading sample 5 (killed by signal: Killed)" + HINT),
        (KILLED, [(41, 3), (42, IDLE)], " between two samples (killed by signal: Killed)" + HINT),
        (EXITED, [(41, 5), (42, 3)], " reading sample 3 or 5 (exited unexpectedly)" + HINT),
    ],
)
def test_a_dead_worker_is_told_with_its_sample(error, rows, said):
    assert reading_of(*rows).explain(RuntimeError(error), 600) == "a loader worker died" + said


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([(41, 3), (42, IDLE)], " reading sample 3"),
        ([(41, 9), (42, 3)], " reading sample 3 or 9"),
        ([(41, 9, 127), (42, IDLE)], " reading sample 9 or one of 127 read with it"),
        ([(41, 9, 127), (42, 3)], " reading sample 3 or 9 or one of 127 read with it"),
        ([(IDLE, IDLE), (42, IDLE)], " between two samples"),
    ],
)
def test_a_worker_that_hangs_is_told_with_its_sample(rows, where):
    said = f"no loader worker has answered for 2.5 s (data.worker_timeout){where}"
    assert reading_of(*rows).explain(RuntimeError(LATE), 2.5) == said


def test_other_errors_stay_what_they_are():
    error = RuntimeError("pin memory failed")
    assert reading_of((41, 3)).explain(error, 600) == "pin memory failed"
