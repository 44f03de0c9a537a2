"""Rows on disk: whatever happens to them, what is read is what was written, or nothing."""

import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy
import pytest

from distill.errors import StorageError
from distill.store import rows as module
from distill.store.folder import entries, garbage, verify
from distill.store.measured import MEASURED, find_measured, forget_damaged, note_measured
from distill.store.rows import META, create, is_sound, open_rows

ROWS, WIDTH = 60, 34


def filled(folder):
    create(folder, {"identity": {}}, ROWS, WIDTH)
    store = open_rows(folder)
    generator = numpy.random.default_rng(0)
    content = generator.integers(0, 256, (ROWS, WIDTH), dtype=numpy.uint8)
    inputs = generator.integers(0, 2**63, ROWS, dtype=numpy.uint64)
    store.write(numpy.arange(ROWS), content, inputs)
    return content, inputs


def read(folder, inputs):
    return open_rows(folder).read(numpy.arange(ROWS), inputs)


def sound(folder, content, inputs):
    """Say which rows are read, and that these are what was written."""
    found = read(folder, inputs)
    assert (found.rows[found.valid] == content[found.valid]).all()
    return found.valid


def test_what_is_written_is_read_again_by_whoever_opens_it(tmp_path):
    content, inputs = filled(tmp_path / "s")
    assert sound(tmp_path / "s", content, inputs).all()
    assert open_rows(tmp_path / "s").filled == ROWS


def test_nothing_is_read_before_it_is_written(tmp_path):
    create(tmp_path / "s", {}, ROWS, WIDTH)
    found = read(tmp_path / "s", numpy.zeros(ROWS, numpy.uint64))
    assert not found.valid.any()
    assert found.refused == 0


def test_a_row_of_another_input_is_not_read(tmp_path):
    content, inputs = filled(tmp_path / "s")
    inputs[7] += numpy.uint64(1)
    valid = sound(tmp_path / "s", content, inputs)
    assert numpy.flatnonzero(~valid).tolist() == [7]
    assert read(tmp_path / "s", inputs).refused == 1


def test_every_flipped_bit_is_found(tmp_path):
    content, inputs = filled(tmp_path / "s")
    draw = random.Random(0)
    for name in ("rows.bin", "checks.bin"):
        file = tmp_path / "s" / name
        whole = file.read_bytes()
        for _ in range(300):
            at, bit = draw.randrange(len(whole)), draw.randrange(8)
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
            valid = sound(tmp_path / "s", content, inputs)
            hit = at * ROWS // len(whole)
            assert numpy.flatnonzero(~valid).tolist() == [hit]
        file.write_bytes(whole)


def test_files_cut_short_anywhere_lose_only_what_was_cut_off(tmp_path):
    content, inputs = filled(tmp_path / "s")
    draw = random.Random(1)
    for name in ("rows.bin", "checks.bin"):
        file = tmp_path / "s" / name
        whole = file.read_bytes()
        for length in [0, *(draw.randrange(len(whole)) for _ in range(40))]:
            file.write_bytes(whole[:length])
            valid = sound(tmp_path / "s", content, inputs)
            kept = length * ROWS // len(whole)
            assert valid[:kept].all()
            assert not valid[kept + 1 :].any()
            file.write_bytes(whole)


def test_a_file_that_is_gone_is_an_empty_one(tmp_path):
    content, inputs = filled(tmp_path / "s")
    (tmp_path / "s" / "rows.bin").unlink()
    assert not sound(tmp_path / "s", content, inputs).any()


def test_a_row_that_two_writers_mixed_is_not_read(tmp_path):
    content, inputs = filled(tmp_path / "s")
    store = open_rows(tmp_path / "s")
    other = content.copy()
    other[3] += 1
    store.rows[3, WIDTH // 2 :] = other[3, WIDTH // 2 :]
    assert numpy.flatnonzero(~sound(tmp_path / "s", content, inputs)).tolist() == [3]


def test_two_runs_that_fill_one_store_both_read_what_either_wrote(tmp_path):
    create(tmp_path / "s", {}, ROWS, WIDTH)
    create(tmp_path / "s", {}, ROWS, WIDTH)
    one, other = open_rows(tmp_path / "s"), open_rows(tmp_path / "s")
    content = numpy.arange(ROWS * WIDTH, dtype=numpy.uint8).reshape(ROWS, WIDTH)
    inputs = numpy.arange(1, ROWS + 1, dtype=numpy.uint64)
    even, odd = numpy.arange(0, ROWS, 2), numpy.arange(1, ROWS, 2)
    one.write(even, content[even], inputs[even])
    other.write(odd, content[odd], inputs[odd])
    for store in (one, other):
        assert store.read(numpy.arange(ROWS), inputs).valid.all()


def test_making_a_store_twice_keeps_what_is_in_it(tmp_path):
    content, inputs = filled(tmp_path / "s")
    create(tmp_path / "s", {}, ROWS, WIDTH)
    assert sound(tmp_path / "s", content, inputs).all()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_store_without_room_is_refused_with_what_it_takes(tmp_path, monkeypatch):
    free = SimpleNamespace(free=10**9)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(StorageError, match=r"2\.6 GB in .*, where 1\.0 GB are free"):
        create(tmp_path / "s", {}, 1_280_000, 2000)
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_another_version_or_without_its_description_is_refused(tmp_path):
    filled(tmp_path / "s")
    meta = json.loads((tmp_path / "s" / META).read_text())
    (tmp_path / "s" / META).write_text(json.dumps({**meta, "format": 99, "sha256": ""}))
    with pytest.raises(StorageError, match="another version"):
        open_rows(tmp_path / "s")
    (tmp_path / "s" / META).write_text("{")
    with pytest.raises(StorageError, match="no store, or a damaged one"):
        open_rows(tmp_path / "s")


def test_verifying_forgets_damaged_rows(tmp_path):
    content, inputs = filled(tmp_path / "s")
    open_rows(tmp_path / "s").rows[5, 0] ^= 1
    assert verify(tmp_path / "s") == (ROWS, 1)
    assert verify(tmp_path / "s") == (ROWS - 1, 0)
    assert numpy.flatnonzero(~sound(tmp_path / "s", content, inputs)).tolist() == [5]


def test_garbage_is_what_is_unused_damaged_or_half_made_and_nothing_of_others(tmp_path):
    for name in ("used", "unused", "damaged", ".making.abc"):
        filled(tmp_path / name)
    (tmp_path / "damaged" / META).write_text("{")
    old = 100 * 86_400
    for name in ("unused", ".making.abc"):
        meta = tmp_path / name / META
        long_ago = meta.stat().st_mtime - old
        module.os.utime(meta, (long_ago, long_ago))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    found = sorted(path.name for path in garbage(tmp_path, 30))
    assert found == [".making.abc", "damaged", "unused"]


def test_stores_are_listed_with_what_is_in_them(tmp_path):
    filled(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / META).write_text("{")
    (tmp_path / "file").write_text("")
    listed = {entry.name: (entry.meta is None, entry.filled) for entry in entries(tmp_path)}
    assert listed == {"a": (False, ROWS), "b": (True, 0)}


def test_every_flipped_bit_of_the_description_is_found_and_a_new_store_is_made(tmp_path):
    filled(tmp_path / "s")
    file = tmp_path / "s" / META
    whole = file.read_bytes()
    draw = random.Random(2)
    for _ in range(200):
        at, bit = draw.randrange(len(whole)), draw.randrange(7)
        flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
        file.write_bytes(flipped)
        is_same = _read(flipped) == json.loads(whole)
        assert is_sound(tmp_path / "s") == is_same
    file.write_bytes(whole[:-9])
    create(tmp_path / "s", {}, ROWS, WIDTH)
    assert open_rows(tmp_path / "s").filled == 0
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".damaged")]) == 1


NUMBERS = {"accuracy": 0.4375, "loss": math.nan, "part.accuracy": 1 / 3}


def test_what_a_teacher_was_measured_as_is_found_by_what_it_was_measured_on(tmp_path):
    assert find_measured(tmp_path, "a") is None
    note_measured(tmp_path, "a", {"accuracy": 0.5})
    note_measured(tmp_path, "b", {"accuracy": 1 / 3})
    note_measured(tmp_path, "a", {"accuracy": 0.25})
    assert find_measured(tmp_path, "a") == {"accuracy": 0.25}
    assert find_measured(tmp_path, "b") == {"accuracy": 1 / 3}
    assert find_measured(tmp_path, "c") is None
    assert [file.name for file in tmp_path.iterdir()] == [MEASURED]


def test_every_flipped_bit_of_what_a_teacher_was_measured_as_is_found(tmp_path):
    note_measured(tmp_path, "key", NUMBERS)
    file = tmp_path / MEASURED
    whole, before = file.read_bytes(), repr(find_measured(tmp_path, "key"))
    for at in range(len(whole)):
        for bit in range(8):
            flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
            file.write_bytes(flipped)
            assert repr(find_measured(tmp_path, "key")) in (before, "None")
            is_same = repr(_read(flipped)) == repr(_read(whole))
            assert (find_measured(tmp_path, "key") is None) != is_same


def test_what_a_teacher_was_measured_as_cut_short_anywhere_is_as_if_it_were_not_there(tmp_path):
    note_measured(tmp_path, "key", NUMBERS)
    file = tmp_path / MEASURED
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert find_measured(tmp_path, "key") is None
    note_measured(tmp_path, "other", NUMBERS)
    assert find_measured(tmp_path, "key") is None
    assert repr(find_measured(tmp_path, "other")) == repr(NUMBERS)


def test_verifying_forgets_what_a_teacher_was_measured_as_if_it_is_damaged(tmp_path):
    assert not forget_damaged(tmp_path)
    note_measured(tmp_path, "key", NUMBERS)
    assert not forget_damaged(tmp_path)
    (tmp_path / MEASURED).write_text('{"key": {"accuracy": 0.9}}')
    assert forget_damaged(tmp_path)
    assert not forget_damaged(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _read(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_store_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    content, inputs = filled(tmp_path / "s")
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    store = open_rows(tmp_path / "s")
    assert store.read(numpy.arange(ROWS), inputs).valid.all()
    store.write(numpy.arange(1), content[:1] + 1, inputs[:1])
    assert sound(tmp_path / "s", content, inputs).all()
