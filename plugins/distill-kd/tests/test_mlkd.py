"""MLKDLoss: the formula written out, identities, extremes, layouts, and what it refuses."""

from __future__ import annotations

import doctest
import math
from statistics import median

import pytest
import torch

import distill_kd.mlkd
from distill.testing import LossConformance
from distill_kd.mlkd import MLKDLoss

each_mask = pytest.mark.parametrize("masks", ["share", "none"])


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def standardized_by_hand(row):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
    return [(x - mean) / (deviation + 1e-7) for x in row]


def products(rows):
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]


def distance(first, second):
    pairs = zip(products(first), products(second), strict=True)
    return sum((x - y) ** 2 for a, b in pairs for x, y in zip(a, b, strict=True))


def turned(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def levels_by_hand(student, teacher, temperatures, standardize=False):
    """Return the three terms without weights, summed over temperatures, and both shares."""
    s, t = student.tolist(), teacher.tolist()
    size, classes = len(s), len(s[0])
    kl = samples = pairs = 0.0
    for temperature in temperatures:
        ours, theirs = ([softmax(row, temperature) for row in side] for side in (s, t))
        samples += distance(ours, theirs) / size
        pairs += distance(turned(ours), turned(theirs)) / classes
        if standardize:
            ours, theirs = (
                [softmax(standardized_by_hand(row), temperature) for row in side] for side in (s, t)
            )
        for q, p in zip(ours, theirs, strict=True):
            terms = (a * math.log(a / b) for a, b in zip(p, q, strict=True))
            kl += temperature**2 * sum(terms) / size
    sure = [max(softmax(row)) for row in t]
    likely = [sum(column) for column in turned([softmax(row) for row in t])]
    shares = [sum(x <= median(found) for x in found) / len(found) for found in (sure, likely)]
    return kl, samples, pairs, *shares


@each_mask
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (6, 4)])
def test_equals_the_formula_written_out(shape, standardize, masks):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    temperatures = [0.7, 2.0, 5.0]
    kl, samples, classes, m1, m2 = levels_by_hand(student, teacher, temperatures, standardize)
    if masks == "none":
        m1 = m2 = 1.0

    loss = MLKDLoss(temperatures, 0.3, 1.7, 2.5, masks, standardize)(student, teacher)

    expected = 0.3 * m1 * kl + 1.7 * m1 * samples + 2.5 * m2 * classes
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_the_defaults_are_those_of_the_authors():
    loss = MLKDLoss()
    assert loss.temperatures == (2.0, 3.0, 4.0, 5.0, 6.0)
    assert (loss.beta, loss.gamma, loss.delta, loss.masks) == (1.0, 1.0, 1.0, "share")


@each_mask
@pytest.mark.parametrize("standardize", [False, True])
def test_gradient_equals_finite_differences(standardize, masks):
    student, teacher = logits(5, 4, seed=3).requires_grad_(), logits(5, 4, seed=4)
    loss = MLKDLoss([0.8, 3.0], 0.4, 1.3, 0.7, masks, standardize)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_logits_give_zero_and_no_gradient(dtype):
    student = logits(6, 5, dtype=dtype).requires_grad_()
    loss = MLKDLoss()(student, student.detach().clone())
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad.abs().max() < 1e-5


def test_without_products_it_is_kd_at_several_temperatures():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    kd = sum(
        distill_kd.KDLoss(temperature, alpha=0.0)(student, teacher) for temperature in (1.0, 3.0)
    )
    loss = MLKDLoss([1.0, 3.0], gamma=0.0, delta=0.0, masks="none")
    torch.testing.assert_close(loss(student, teacher), kd)


def test_gathered_samples_of_all_processes_give_the_loss_of_one_that_has_them(monkeypatch):
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    others = iter([student[2:], teacher[2:], mask[2:].bool()])
    monkeypatch.setattr(
        "distill_kd.batch_logits.global_rows", lambda rows: torch.cat([rows, next(others)])
    )
    found = MLKDLoss(gather="all")(student[:2], teacher[:2], mask=mask[:2])
    assert next(others, None) is None
    torch.testing.assert_close(found, MLKDLoss()(student, teacher, mask=mask))


@each_mask
@pytest.mark.parametrize("hole", [1e4, math.nan])
def test_samples_that_do_not_count_are_as_if_they_were_not_there(hole, masks):
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    student[[1, 4]] = hole
    student.requires_grad_()
    kept = [0, 2, 3, 5]
    loss = MLKDLoss(masks=masks)
    targets, mask = torch.tensor([0, -100, 2, 3, 4, 0]), torch.tensor([1, 1, 1, 1, 0, 1])

    found, expected = loss(student, teacher, targets, mask), loss(student[kept], teacher[kept])

    torch.testing.assert_close(found, expected)
    gradient, wanted = (torch.autograd.grad(value, student)[0] for value in (found, expected))
    torch.testing.assert_close(gradient[kept], wanted[kept])
    assert gradient[[1, 4]].eq(0).all()


def test_where_nothing_counts_the_loss_is_zero():
    student = logits(3, 4).requires_grad_()
    loss = MLKDLoss()(student, logits(3, 4, seed=1), mask=torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


@pytest.mark.parametrize(("dims", "class_dim"), [((0, 3, 1, 2), None), ((0, 1, 2, 3), -1)])
def test_of_dense_logits_each_position_is_a_sample(dims, class_dim):
    student, teacher = logits(2, 2, 3, 5, seed=1), logits(2, 2, 3, 5, seed=2)
    dense = [side.permute(dims) for side in (student, teacher)]
    rows = [side.reshape(12, 5) for side in (student, teacher)]
    found = MLKDLoss(class_dim=class_dim)(*dense)
    torch.testing.assert_close(found, MLKDLoss()(*rows))


@each_mask
@pytest.mark.parametrize("low", [-1e4, -math.inf])
def test_a_one_hot_teacher_and_huge_logits_give_finite_numbers(low, masks):
    student = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[low, 0.0, low], [0.0, low, low]])
    loss = MLKDLoss(masks=masks)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_nan_logits_are_not_hidden():
    student = logits(2, 3)
    student[0, 0] = math.nan
    assert MLKDLoss()(student, logits(2, 3, seed=1)).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student = logits(8, 10, seed=1).to(dtype).requires_grad_()
    teacher = logits(8, 10, seed=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MLKDLoss()(student, teacher)
    loss.backward()
    exact = MLKDLoss()(student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.dtype == dtype


class TestMLKDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return MLKDLoss([1.0, 4.0])

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperatures": []}, r"temperatures must be a list of one at least, got \[\]"),
        ({"temperatures": [2.0, 0.0]}, r"temperature must be a finite number > 0, got 0\.0"),
        ({"beta": -1.0}, r"beta must be a finite number >= 0, got -1\.0"),
        ({"delta": math.inf}, "delta must be a finite number >= 0, got inf"),
        ({"masks": "samples"}, "masks must be one of 'share', 'none', got 'samples'"),
        ({"gather": "some"}, "gather must be one of 'none', 'all', got 'some'"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=f"MLKDLoss: {message}"):
        MLKDLoss(**params)


@pytest.mark.parametrize(
    ("shape", "weight", "what"),
    [((8193, 2), "gamma", "samples"), ((2, 8193), "delta", "classes")],
)
def test_more_than_can_be_related_is_refused_unless_left_out(shape, weight, what):
    many = torch.zeros(shape)
    message = f"every two {what} to each other, at most 8,192; got 8,193; {weight}: 0 leaves"
    with pytest.raises(ValueError, match=message):
        MLKDLoss()(many, many)
    assert MLKDLoss([1.0], **{weight: 0.0})(many, many).item() == 0


def test_printing_shows_every_parameter():
    assert repr(MLKDLoss([4], 0.5, masks="none")) == (
        "MLKDLoss(temperatures=(4,), beta=0.5, gamma=1.0, delta=1.0, masks='none', "
        "standardize=False, gather='none', ignore_index=-100, class_dim=None)"
    )


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.mlkd)
    assert results.attempted > 0
    assert results.failed == 0
