"""The weight of a term over a stage."""

import pytest

from distill.weight_schedule import WeightSchedule


def epochs(schedule, count):
    return [schedule.at(epoch, 999) for epoch in range(count)]


def test_a_ramp_is_that_of_dkd():
    schedule = WeightSchedule(over=20)
    assert epochs(schedule, 30) == pytest.approx([min(n / 20, 1.0) for n in range(1, 31)])


def test_without_a_ramp_the_weight_is_its_end():
    assert epochs(WeightSchedule(start=3.0, end=2.0), 3) == [2.0, 2.0, 2.0]


def test_a_ramp_begins_after_and_the_weight_ends_with_stop():
    schedule = WeightSchedule(start=1.0, end=3.0, over=2, after=2, stop=6)
    assert epochs(schedule, 8) == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 0.0, 0.0]


def test_a_jump_comes_after():
    assert epochs(WeightSchedule(start=0.5, end=2.0, after=2), 4) == [0.5, 0.5, 2.0, 2.0]


def test_half_a_wave_has_the_ends_and_the_middle_of_a_line():
    schedule = WeightSchedule(start=1.0, end=0.0, over=4, shape="cosine")
    expected = [0.8535533906, 0.5, 0.1464466094, 0.0, 0.0]
    assert epochs(schedule, 5) == pytest.approx(expected)


def test_steps_are_counted_over_the_stage():
    schedule = WeightSchedule(over=4, unit="steps")
    assert [schedule.at(9, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
