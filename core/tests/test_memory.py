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


VERSIONS = {
    "2": ("0::/job/step", "", "memory.max", "memory.current", ""),
    "1": (
        "4:cpu,memory:/job/step",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
}


@pytest.mark.parametrize("group", ["", "job", "job/step"])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_container_s_limit_leaves_counts_with_files_that_can_be_dropped(
    monkeypatch, tmp_path, version, group
):
    monkeypatch.undo()
    own, top, limit, used, prefix = VERSIONS[version]
    (tmp_path / "own").write_text(f"7:pids:/x\n{own}\n")
    monkeypatch.setattr(memory, "_OWN", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    folder = tmp_path / top / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text("3000\n")
    (folder / used).write_text("2900\n")
    (folder / "memory.stat").write_text(f"{prefix}active_file 600\n{prefix}inactive_file 300\n")
    assert memory.free_memory(CPU) == 1000
    (folder / limit).write_text("max\n")
    assert memory.free_memory(CPU) > 3000
    assert memory.free_memory(torch.device("meta")) is None


def test_without_control_groups_the_machine_s_memory_counts(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_OWN", tmp_path / "none")
    assert memory.free_memory(CPU) > 10**6


def test_processes_of_a_machine_share_its_memory(monkeypatch, capsys):
    here = memory.socket.gethostname()
    monkeypatch.setattr(memory, "gather_objects", lambda own: [here, "another", here])
    with pytest.raises(
        ValueError, match=r"banks take 600.0 MB on cpu in each of 2 processes.*: 200.0 MB are"
    ):
        claim(600_000_000, CPU, "banks")
    claim(500_000_000, CPU, "banks")
    assert "banks take 500.0 MB on cpu in each of 2 processes" in capsys.readouterr().err
    claim(900_000_000, torch.device("meta"), "banks of a device of its own")
    assert "each" not in capsys.readouterr().err
