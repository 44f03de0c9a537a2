import pytest
import torch

from distill import Batch, DataError
from distill.builtin.accuracy import accuracy


def batch(targets):
    return Batch(torch.zeros(len(targets)), targets, torch.arange(len(targets)))


def by_hand(logits, labels, top_k):
    """Hits over labels, one label after the other."""
    hits = counted = 0
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    for row, label in zip(rows, labels.reshape(-1).tolist(), strict=True):
        if label >= 0:
            higher = sum(value > row[label] for value in row)
            hits += higher < top_k
            counted += 1
    return hits / counted if counted else 0.0


@pytest.mark.parametrize("top_k", [1, 2, 5, 7])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5)])
@pytest.mark.parametrize("ignored", [False, True])
def test_accuracy_is_that_of_the_formula(top_k, shape, ignored):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 7, *shape, generator=generator)
    labels = torch.randint(-3 if ignored else 0, 7, (30, *shape), generator=generator)
    metric = accuracy(top_k)
    for start in range(0, 30, 8):
        metric.update(logits[start : start + 8], batch(labels[start : start + 8]))
    assert metric.compute() == pytest.approx(by_hand(logits, labels, top_k), abs=1e-12)


def test_merged_parts_are_the_whole_and_reset_forgets():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    whole, part, other = accuracy(), accuracy(), accuracy()
    whole.update(logits, batch(labels))
    part.update(logits[:2], batch(labels[:2]))
    other.update(logits[2:], batch(labels[2:]))
    part.merge(other.state())
    assert part.state() == whole.state()
    assert part.compute() == whole.compute()
    part.reset()
    assert part.state() == (0, 0)


def test_without_labels_it_is_zero():
    metric = accuracy()
    assert metric.compute() == 0.0
    metric.update(torch.randn(2, 3), batch(torch.tensor([-1, -100])))
    assert metric.compute() == 0.0


@pytest.mark.parametrize(
    ("output", "targets", "said"),
    [
        ({"out": 1}, torch.tensor([0]), "accuracy needs logits and labels as tensors"),
        (torch.zeros(2, 3), [0, 1], "accuracy needs logits and labels as tensors"),
        (torch.zeros(2, 3), torch.zeros(2, 3), r"labels of shape \(2,\) for logits \(2, 3\), got"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 1]), r"labels of shape \(2, 4\) for logits"),
        (torch.zeros(2), torch.tensor([0, 1]), r"accuracy needs logits \(B, K\), got shape \(2,\)"),
        (torch.tensor(1.0), torch.tensor(1), r"accuracy needs logits \(B, K\), got shape \(\)"),
    ],
)
def test_what_it_cannot_count_is_an_error_in_words(output, targets, said):
    with pytest.raises(DataError, match=said):
        accuracy().update(output, Batch(None, targets, torch.arange(2)))


def test_top_k_is_at_least_one():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        accuracy(0)


def test_there_have_to_be_top_k_classes():
    with pytest.raises(DataError, match="counts the first 4 of 3 classes, which is all"):
        accuracy(4).update(torch.zeros(2, 3), batch(torch.tensor([0, 1])))
