"""FSPLoss: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_relational import FSPLoss

METHOD = "fsp"
NAMES = ("student_first", "student_second", "teacher_first", "teacher_second")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flow(first, second):
    """Return the matrix of one sample, as lists, from maps (C, H, W) of one size."""
    height, width = first.shape[1:]
    places = [(h, w) for h in range(height) for w in range(width)]
    return [[sum(float(a[p] * b[p]) for p in places) / len(places) for b in second] for a in first]


def by_hand(maps, form):
    """Return the loss of one pair of layers, of maps that are of one size within a network."""
    total = 0.0
    student_first, student_second, first, second = maps
    for b in range(len(first)):
        ours, theirs = flow(student_first[b], student_second[b]), flow(first[b], second[b])
        apart = [
            [s - t for s, t in zip(*rows, strict=True)] for rows in zip(ours, theirs, strict=True)
        ]
        if form == "torchdistill":
            columns = zip(*apart, strict=True)
            total += sum(math.sqrt(sum(v**2 for v in column)) for column in columns)
        else:
            total += sum(value**2 for row in apart for value in row)
    entries = first.shape[1] * second.shape[1] if form == "mse" else 1
    return total / len(first) / entries


class TestFSPLoss(LossConformance):
    student = "student_first"
    teacher = "teacher_first"

    def make(self):
        return FSPLoss()

    def tensors(self, batch):
        first, second = (batch, 3, 4, 4), (batch, 2, 2, 2)
        shapes = (first, second, first, second)
        return {name: torch.randn(*shape) for name, shape in zip(NAMES, shapes, strict=True)}


class TestFSPLossOfThePaper(TestFSPLoss):
    def make(self):
        return FSPLoss("paper")


class TestFSPLossOfTorchdistill(TestFSPLoss):
    def make(self):
        return FSPLoss("torchdistill")


def test_loss_and_gradients_equal_the_reference(reference):
    weights = reference.params["weights"]
    maps = [[reference.tensor(f"{name}_{i}") for i in range(len(weights))] for name in NAMES]
    reference.check(FSPLoss(reference.variant, layer_weights=weights)(*maps))


@pytest.mark.parametrize("form", ["mse", "paper", "torchdistill"])
def test_equals_the_formula_written_out(form):
    pairs = [
        [draw(3, 4, 2, 3, seed=1), draw(3, 5, 2, 3, seed=2)],
        [draw(3, 2, 3, 1, seed=5), draw(3, 3, 3, 1, seed=6)],
    ]
    teachers = [
        [draw(3, 4, 4, 1, seed=3), draw(3, 5, 4, 1, seed=4)],
        [draw(3, 2, 1, 2, seed=7), draw(3, 3, 1, 2, seed=8)],
    ]
    expected = [by_hand([*s, *t], form) for s, t in zip(pairs, teachers, strict=True)]
    students_first, students_second = zip(*pairs, strict=True)
    given = (students_first, students_second, *zip(*teachers, strict=True))
    assert FSPLoss(form)(*given).item() == pytest.approx(sum(expected), rel=1e-9)
    weighed = FSPLoss(form, layer_weights=[0.5, 3.0])(*given).item()
    assert weighed == pytest.approx(0.5 * expected[0] + 3 * expected[1], rel=1e-9)


@pytest.mark.parametrize(
    ("form", "pooling", "pool"),
    [
        ("mse", None, F.adaptive_avg_pool2d),
        ("mse", "max", F.adaptive_max_pool2d),
        ("paper", None, F.adaptive_max_pool2d),
        ("paper", "average", F.adaptive_avg_pool2d),
        ("torchdistill", None, F.adaptive_max_pool2d),
    ],
)
def test_the_larger_map_is_pooled_to_the_smaller_in_each_dimension(form, pooling, pool):
    maps = [draw(2, 3, 6, 4, seed=1), draw(2, 2, 3, 5, seed=2)]
    likes = [draw(2, 3, 2, 2, seed=3), draw(2, 2, 4, 2, seed=4)]
    pooled = [pool(m, (3, 4)) for m in maps] + [pool(m, (2, 2)) for m in likes]
    assert FSPLoss(form, pooling)(*maps, *likes).item() == pytest.approx(by_hand(pooled, form))


def test_only_the_student_gets_a_gradient():
    maps = [draw(2, 3, 4, 4, seed=seed).requires_grad_() for seed in range(4)]
    FSPLoss()(*maps).backward()
    assert all(m.grad.abs().sum() > 0 for m in maps[:2])
    assert all(m.grad is None for m in maps[2:])


@pytest.mark.parametrize("form", ["mse", "paper", "torchdistill"])
def test_identical_maps_give_0_without_a_gradient(form):
    first, second = draw(2, 3, 4, 4).requires_grad_(), draw(2, 5, 2, 2).requires_grad_()
    loss = FSPLoss(form)(first, second, first, second)
    loss.backward()
    assert loss.item() == 0
    assert not first.grad.any()
    assert not second.grad.any()


@pytest.mark.parametrize("form", ["mse", "paper", "torchdistill"])
def test_half_precision_is_within_a_percent(form):
    maps = [draw(4, 6, 4, 4, seed=seed) for seed in range(4)]
    rounded = FSPLoss(form)(*(m.bfloat16() for m in maps))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(FSPLoss(form)(*maps).item(), rel=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"form": "x"}, "form must be one of 'mse', 'paper', 'torchdistill', got 'x'"),
        ({"pooling": "x"}, "pooling must be one of 'average', 'max', got 'x'"),
        ({"layer_weights": [-1.0]}, "layer_weights must be finite numbers >= 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=f"FSPLoss: {message}"):
        FSPLoss(**params)


def test_features_that_cannot_be_compared_are_refused():
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\) must be of the same .*1x1 convolution"):
        FSPLoss()(one, one, one, other)
    with pytest.raises(ValueError, match="must be of the same batch"):
        FSPLoss()(one, torch.zeros(1, 3, 4, 4), one, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="got 2 of student_first, 1 of student_second, 1 of tea"):
        FSPLoss()([one, one], one, one, one)
    with pytest.raises(ValueError, match="features of one layer at least are needed, got none"):
        FSPLoss()([], [], [], [])
    with pytest.raises(ValueError, match=r"teacher_second must be maps \(B, C, H, W\), got \(2, 3"):
        FSPLoss()(one, one, one, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="layer_weights has 2 numbers for 1 layers"):
        FSPLoss(layer_weights=[1.0, 1.0])(one, one, one, one)


def test_printing_shows_every_parameter():
    assert repr(FSPLoss()) == "FSPLoss(form='mse', pooling=None, layer_weights=None)"
