"""A batch against a store: what is there is read, what is missing is written, partners count."""

import numpy
import torch

from distill.data.batch import Batch
from distill.model.stored import Outputs, form_of, mixed_fingerprints
from distill.model.wiring import Address
from distill.store.rows import create, open_rows
from distill.store_settings import Store

SAMPLES, VIEWS = 6, 2


def outputs(folder):
    values = {"teacher": torch.zeros(2, 3)}
    form = form_of(values, [Address("teacher", "teacher")], "teacher", 2, Store("float32"))
    create(folder / "s", {}, SAMPLES * VIEWS, form.layout.width)
    return Outputs(open_rows(folder / "s"), form, VIEWS)


def batch(index, view=0, lead=0, inputs=0):
    index = torch.tensor(index)
    return Batch(
        None,
        None,
        index,
        view=torch.full_like(index, view),
        fingerprint=100 * index + view + inputs,
        lead=lead,
    )


def given(first, count):
    return {"teacher": torch.full((count, 3), float(first))}


def test_what_is_missing_is_written_and_what_is_there_stays(tmp_path):
    store = outputs(tmp_path)
    store.keep(store.find(batch([1, 2])), given(1, 2))
    found = store.find(batch([2, 3]))
    assert found.missing.tolist() == [False, True]
    merged = store.keep(found, given(7, 2))
    assert merged["teacher"][:, 0].tolist() == [1, 7]
    again = store.find(batch([3, 2, 1]))
    assert again.missing is None
    assert store.values(again)["teacher"][:, 0].tolist() == [7, 1, 1]
    assert store.computed == 3


def test_views_have_rows_of_their_own(tmp_path):
    store = outputs(tmp_path)
    store.keep(store.find(batch([1], view=1)), given(4, 1))
    assert store.find(batch([1], view=0)).missing is not None
    assert store.find(batch([1], view=1)).missing is None
    assert store.find(batch([1], view=1)).at.tolist() == [3]


def test_another_input_is_a_miss_and_is_counted(tmp_path):
    store = outputs(tmp_path)
    store.keep(store.find(batch([1])), given(4, 1))
    assert store.find(batch([1], inputs=1)).missing.tolist() == [True]
    assert store.refused == 1


def test_samples_of_the_neighbours_part_are_not_looked_up(tmp_path):
    store = outputs(tmp_path)
    store.mixed = 1
    found = store.find(batch([5, 1, 2], lead=1))
    assert found.at.tolist() == [2, 4]


def test_a_mixed_sample_is_known_by_itself_and_those_before_it():
    plain = numpy.array([11, 22, 33, 44], dtype=numpy.int64)
    assert (mixed_fingerprints(plain, 0) == plain).all()
    for transforms in (1, 2):
        mixed = mixed_fingerprints(plain, transforms)
        for changed in range(4):
            other = plain.copy()
            other[changed] += 1
            differs = mixed_fingerprints(other, transforms) != mixed
            concerned = {(changed + n) % 4 for n in range(transforms + 1)}
            assert set(numpy.flatnonzero(differs)) == concerned
    assert mixed_fingerprints(plain[::-1], 1)[1] != mixed_fingerprints(plain, 1)[3]


def test_a_mixed_sample_is_known_by_the_place_of_its_batch_too():
    plain = numpy.array([11, 22], dtype=numpy.int64)
    found = {tuple(mixed_fingerprints(plain, 1, place)) for place in [(0, 0), (0, 1), (1, 0)]}
    assert len(found) == 3


def test_a_part_with_its_lead_mixes_as_the_whole_batch_does():
    plain = numpy.array([11, 22, 33, 44], dtype=numpy.int64)
    whole = mixed_fingerprints(plain, 1)
    part = mixed_fingerprints(plain[1:], 1)[1:]
    assert (part == whole[2:]).all()
