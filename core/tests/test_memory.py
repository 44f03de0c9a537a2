"""Much memory is told, or refused, before it is taken."""

import pytest
import torch

from distill import claim, memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_gigabyte_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    monkeypatch.setattr(memory, "_told", set())


def test_what_is_taken_is_told_once(capsys):
    for _ in range(2):
        claim(25_600_000, CPU, "banks of 50,000 x 128 float32")
    text = "banks of 50,000 x 128 float32 take 25.6 MB on cpu, where 1.0 GB are free\n"
    assert capsys.readouterr().err == text


def test_what_is_not_there_is_refused_with_what_is_missing(capsys):
    with pytest.raises(
        ValueError, match=r"banks take 1.5 GB on cpu.*: 500.0 MB are missing; halve"
    ):
        claim(1_500_000_000, CPU, "banks", "halve them")
    assert capsys.readouterr().err == ""


def test_a_device_that_does_not_tell_is_believed(monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    claim(2_000, torch.device("meta"), "banks")
    assert capsys.readouterr().err == "banks take 2.0 kB on meta\n"


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    monkeypatch.undo()
    for name, value in (("_LIMIT", "3000\n"), ("_USED", "1000\n")):
        file = tmp_path / name
        file.write_text(value)
        monkeypatch.setattr(memory, name, file)
    assert memory.free_memory(CPU) == 2000
    (tmp_path / "_LIMIT").write_text("max\n")
    assert memory.free_memory(CPU) > 2000
    assert memory.free_memory(torch.device("meta")) is None
