"""Samples of other classes: which, how often, and when again."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from distill_crd.negatives import MARKED_AT_ONCE, NONE, Classes, prime_from, scattered

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 2, 2, 5, -1, -1])
"""Class 5 has a single sample, and the last two have no class."""
CHI_SQUARE = {11: 31.3}
"""Degrees of freedom -> what it exceeds once in a thousand times."""


def key(number: int) -> torch.Tensor:
    return torch.tensor(number)


def kept_of(
    labels: torch.Tensor, samples: list[int], count: int, number: int
) -> list[torch.Tensor]:
    """Return the negatives of each of some samples."""
    numbers, kept, counts = Classes(labels, count).listed(torch.tensor(samples), key(number))
    assert counts.tolist() == kept.sum(1).tolist()
    return [row[keeps] for row, keeps in zip(numbers, kept, strict=True)]


def drawn(labels: torch.Tensor, sample: int, count: int, keys: int) -> torch.Tensor:
    """Return what is drawn for one sample with many keys, (keys, count)."""
    classes, index = Classes(labels, count), torch.tensor([sample])
    rows = [classes.listed(index, key(number))[:2] for number in range(keys)]
    return torch.stack([numbers[kept] for numbers, kept in rows])


def is_other(labels: torch.Tensor, sample: int) -> torch.Tensor:
    """Return which samples may be drawn for one."""
    other = labels != labels[sample] if labels[sample] >= 0 else torch.ones(len(labels)).bool()
    other[sample] = False
    return other


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return ((counts - expected).square() / expected).sum().item()


@pytest.mark.parametrize("sample", range(len(LABELS)))
@pytest.mark.parametrize("more", [0, 100])
def test_negatives_are_all_those_of_other_classes_if_so_many_are_asked_for(
    sample: int, more: int
) -> None:
    wanted = is_other(LABELS, sample).nonzero().flatten().tolist()
    for number in range(20):
        kept = kept_of(LABELS, [sample], len(wanted) + more, number)[0]
        assert kept.sort().values.tolist() == wanted


def test_no_sample_comes_twice_and_none_of_the_own_class() -> None:
    labels, index = torch.arange(5000) % 10, list(range(0, 5000, 79))
    rows = kept_of(labels, index, 4000, 7)
    assert all(len(row.unique()) == len(row) == 4000 for row in rows)
    assert not any((labels[row] == labels[own]).any() for row, own in zip(rows, index, strict=True))


def test_enough_candidates_are_drawn_to_keep_as_many_as_asked_for() -> None:
    labels = torch.cat([torch.zeros(300), torch.arange(1, 701)]).long()
    for number in range(100):
        rows = kept_of(labels, [0, 299], 200, number)
        assert [len(row) for row in rows] == [200, 200]


def test_each_other_sample_comes_equally_often() -> None:
    other = is_other(LABELS, 11)
    counts = drawn(LABELS, 11, 3, 4000).flatten().bincount(minlength=len(LABELS))[other]
    assert len(counts) == 12
    assert chi_square(counts) < CHI_SQUARE[11]


def test_each_pair_of_them_comes_about_equally_often() -> None:
    """Of 12 others, a number with many divisors; to reject the own one matters more for so few."""
    labels = torch.tensor([0, *[1] * 12])
    rows = drawn(labels, 0, 3, 6000).sort(1).values
    pairs = torch.cat([rows[:, [0, 1]], rows[:, [0, 2]], rows[:, [1, 2]]])
    counts = (pairs[:, 0] * 13 + pairs[:, 1]).unique(return_counts=True)[1]
    assert len(counts) == 66
    assert (counts / counts.float().mean()).min() > 0.7
    assert (counts / counts.float().mean()).max() < 1.3


def test_in_more_data_each_pair_comes_equally_often() -> None:
    labels = torch.arange(120) % 2
    rows = drawn(labels, 0, 40, 4000)
    together = torch.zeros(120, 120)
    for row in rows:
        together[row[:, None], row] += 1
    pairs = together[1::2, 1::2][~torch.eye(60, dtype=torch.bool)]
    expected = 4000 * 40 * 39 / (60 * 59)
    assert (pairs / expected - 1).abs().max() < 0.12


def test_classes_of_negatives_scatter_as_in_a_draw_without_replacement() -> None:
    """Hypergeometric: mean and variance of how many of each class are drawn."""
    labels = torch.arange(1000) % 10
    index = list(range(0, 1000, 10))  # all of class 0
    counts = torch.stack(
        [
            labels[row].bincount(minlength=10)[1:]
            for number in range(20)
            for row in kept_of(labels, index, 300, number)
        ]
    ).double()
    share, whole = 100 / 900, 900
    assert (counts.mean(0) - 300 * share).abs().max() < 0.6
    variance = 300 * share * (1 - share) * (whole - 300) / (whole - 1)
    assert 0.85 * variance < counts.var(0).mean() < 1.15 * variance
    assert counts.min() > 5  # no class is ever left out


def test_what_is_drawn_depends_on_key_and_sample_and_not_on_the_rest_of_the_batch() -> None:
    labels = torch.arange(600) % 3
    first, second = kept_of(labels, [4, 9], 50, 1)
    assert torch.equal(kept_of(labels, [9], 50, 1)[0], second)
    assert not torch.equal(first, second)
    assert not torch.equal(kept_of(labels, [9], 50, 2)[0], second)


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        (LABELS, 4),
        (LABELS, 9),
        (LABELS, 100),
        (torch.arange(3000) % 7, 1000),
        (torch.cat([torch.zeros(2400), torch.arange(1, 601)]).long(), 500),
        (torch.full((500,), -1), 499),
        (torch.full((500,), -1), 200),
        (torch.arange(40_000) % 3, 7),
    ],
    ids=str,
)
def test_marks_stand_where_what_is_listed_is_kept(
    labels: torch.Tensor, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MARKED_AT_ONCE, "cpu", 30)
    monkeypatch.setattr("distill_crd.negatives.OWN_AT_ONCE", 2)
    samples = [0, 10, 12, 4, 1]
    for number in range(10):
        marks, counts = Classes(labels, count).marked(torch.tensor(samples), key(number))
        rows = [row.sort().values.tolist() for row in kept_of(labels, samples, count, number)]
        assert marks.shape == (len(labels), 5)
        assert [column.nonzero().flatten().tolist() for column in marks.T] == rows
        assert counts.tolist() == [len(row) for row in rows]


def test_a_shared_draw_has_different_samples_of_any_class() -> None:
    labels = torch.arange(100) % 4
    shared, of = Classes(labels, 60).shared(key(5))
    assert len(shared.unique()) == 61
    assert ((of == NONE) == (shared >= 100)).all()
    everyone, _ = Classes(labels, 101).shared(key(5))
    assert everyone.sort().values.tolist() == list(range(101))
    classes = Classes(labels, 9)
    counts = torch.cat([classes.shared(key(k))[0] for k in range(3000)]).bincount()
    assert counts.min() > 200
    assert counts.max() < 400


def test_one_of_the_same_class_may_be_any_of_it() -> None:
    classes = Classes(LABELS, 1)
    index = torch.tensor([0, 10])
    same = torch.stack([classes.same(index, key(k)) for k in range(200)])
    assert set(same[:, 0].tolist()) == {0, 3, 6, 7}
    assert set(same[:, 1].tolist()) == {10}


def test_scattered_numbers_are_those_of_splitmix64() -> None:
    """Against whole numbers without bound."""
    for number in (0, 1, 12345, 2**62):
        z = (number + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        assert int(scattered(torch.tensor(number))) % 2**64 == z


def test_the_next_prime_is_found() -> None:
    assert [prime_from(n) for n in (1, 2, 3, 4, 9, 50_000)] == [2, 2, 3, 5, 11, 50_021]


class Peak(TorchDispatchMode):
    """Notes the most bytes that tensors had together after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.alive = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(count for _, count in self.alive.values()))
        return result


def test_classes_are_found_in_at_most_32_bytes_a_sample_beside_the_labels() -> None:
    """Of which they keep 16: 41 MB for the 1.28 million samples of ImageNet."""
    labels = torch.randint(1000, (100_000,))
    with Peak() as peak:
        classes = Classes(labels, 1000)
    kept = sum(buffer.nbytes for buffer in classes.buffers())
    assert kept < 16.5 * len(labels)
    assert peak.bytes < 32.5 * len(labels)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([7, -1, 2**62, 7, -1, 0, 2**62]),
        torch.randint(50, (997,), generator=torch.Generator().manual_seed(0)),
        torch.full((9,), -1),
        torch.tensor([4]),
    ],
    ids=["large, and none", "many", "no classes", "one sample"],
)
def test_samples_lie_side_by_side_by_class_whatever_the_labels_are(labels: torch.Tensor) -> None:
    given = labels.clone()
    classes = Classes(labels, 3)
    assert labels.equal(given)
    groups: dict[object, list[int]] = {}
    for sample, label in enumerate(labels.tolist()):
        groups.setdefault(label if label >= 0 else ("alone", sample), []).append(sample)
    first, members = classes.first.tolist(), classes.members.tolist()
    found = [
        classes.order[start : start + count].tolist()
        for start, count in zip(first, members, strict=True)
    ]
    assert sorted(found) == sorted(groups.values())
    for number, group in enumerate(found):
        assert classes.of[group].tolist() == [number] * len(group)
