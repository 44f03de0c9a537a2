"""SKDLoss: the formula written out, identities, extremes, layouts, and what it refuses."""

from __future__ import annotations

import doctest
import math
from statistics import median

import pytest
import torch

import distill_kd.skd
from distill.testing import LossConformance
from distill_kd.skd import SKDLoss

each_mask = pytest.mark.parametrize("masks", ["share", "samples", "none"])


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def solved(matrix, vector):
    """Return the solution x of matrix x = vector, by elimination."""
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for place, pivot in enumerate(rows):
        for row in rows:
            if row is not pivot:
                factor = row[place] / pivot[place]
                row[:] = [a - factor * b for a, b in zip(row, pivot, strict=True)]
    return [row[-1] / row[place] for place, row in enumerate(rows)]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def direction_by_hand(student, teacher, tikhonov, scale):
    s, t = student.tolist(), teacher.tolist()
    size = len(s)
    d = [
        [(cosine(s[i], s[j]) - cosine(t[i], t[j])) / scale for j in range(size)]
        for i in range(size)
    ]
    means = [sum(row[j] for row in d) / size for j in range(size)]
    covariance = [
        [
            sum((row[i] - means[i]) * (row[j] - means[j]) for row in d) / (size - 1)
            + tikhonov * (i == j)
            for j in range(size)
        ]
        for i in range(size)
    ]
    squares = [sum(x * y for x, y in zip(row, solved(covariance, row), strict=True)) for row in d]
    return sum(map(math.sqrt, squares)) / size


def loss_by_hand(student, teacher, targets, temperature, weights, tikhonov, scaled, masks):
    s, t = student.tolist(), teacher.tolist()
    size, classes = student.shape
    alpha, beta, gamma = weights
    ce = -sum(math.log(softmax(row)[y]) for row, y in zip(s, targets.tolist(), strict=True)) / size
    kl = []
    for ours, theirs in zip(s, t, strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    sure = [max(softmax(row)) for row in t]
    unsure = [value <= median(sure) for value in sure]
    likely = [sum(column) for column in zip(*(softmax(row) for row in t), strict=True)]
    of_classes = sum(value <= median(likely) for value in likely) / classes
    if masks == "samples":
        instance = sum(k for k, kept in zip(kl, unsure, strict=True) if kept) / size
    else:
        instance = sum(kl) / size * (sum(unsure) / size if masks == "share" else 1)
    direction = direction_by_hand(student, teacher, tikhonov, classes if scaled else 1)
    direction *= 1 if masks == "none" else of_classes
    return alpha * ce + beta * temperature**2 * instance + gamma * direction


@each_mask
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("shape", "temperature"), [((2, 2), 0.7), ((3, 7), 4.0), ((6, 4), 2.0)])
def test_equals_the_formula_written_out(shape, temperature, scaled, masks):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = torch.arange(shape[0]) % shape[1]
    weights = (0.3, 1.7, 2.5)

    loss = SKDLoss(temperature, *weights, 0.03, scaled, masks)(student, teacher, targets)

    expected = loss_by_hand(student, teacher, targets, temperature, weights, 0.03, scaled, masks)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@each_mask
def test_gradient_equals_finite_differences(masks):
    student, teacher = logits(5, 4, seed=3).requires_grad_(), logits(5, 4, seed=4)
    loss = SKDLoss(2.0, 0.4, 1.3, 0.7, tikhonov=0.01, scale_by_classes=False, masks=masks)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, torch.arange(5) % 4), student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_logits_give_zero_and_no_gradient(dtype):
    student = logits(6, 5, dtype=dtype).requires_grad_()
    loss = SKDLoss(alpha=0.0)(student, student.detach().clone())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_the_length_of_logits_does_not_matter_to_the_direction():
    student, teacher = logits(5, 4, seed=1), logits(5, 4, seed=2)
    direction = SKDLoss(alpha=0.0, beta=0.0)
    lengths = torch.tensor([[0.1], [2.0], [30.0], [1.0], [7.0]], dtype=torch.float64)
    torch.testing.assert_close(direction(lengths * student, teacher), direction(student, teacher))


def test_logits_of_zeros_have_no_direction_and_get_no_gradient_from_it():
    """As those of a student whose last layer starts with zeros."""
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    student[1] = 0.0
    student.requires_grad_()
    loss = SKDLoss(alpha=0.0, beta=0.0, gamma=1.0)(student, teacher)
    loss.backward()
    assert loss.item() > 0
    assert student.grad[1].eq(0).all()
    assert student.grad.abs().max() < 1


def test_a_batch_of_one_has_no_direction():
    student, teacher = logits(1, 5, seed=1).requires_grad_(), logits(1, 5, seed=2)
    loss = SKDLoss(alpha=0.0, beta=0.0, gamma=1.0)(student, teacher)
    loss.backward()
    assert abs(loss.item()) < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_only_the_direction_depends_on_which_samples_are_in_the_batch():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)

    def halves(loss):
        return (loss(student[:3], teacher[:3]) + loss(student[3:], teacher[3:])) / 2

    instance = SKDLoss(alpha=0.0, gamma=0.0, masks="none")
    direction = SKDLoss(alpha=0.0, beta=0.0, masks="none")
    torch.testing.assert_close(halves(instance), instance(student, teacher))
    assert (halves(direction) - direction(student, teacher)).abs() > 1e-3


def test_without_targets_the_cross_entropy_is_left_out():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    torch.testing.assert_close(SKDLoss()(student, teacher), SKDLoss(alpha=0.0)(student, teacher))


def test_class_probabilities_serve_as_labels():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    targets = torch.tensor([0, 3, 1, 1])
    known = torch.nn.functional.one_hot(targets, 5).double()
    torch.testing.assert_close(
        SKDLoss()(student, teacher, known), SKDLoss()(student, teacher, targets)
    )


def test_gathered_samples_of_all_processes_give_the_loss_of_one_that_has_them(monkeypatch):
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    targets = torch.tensor([0, 3, 1, 1, 4, 2])
    others = iter([student[2:], teacher[2:], targets[2:], mask[2:].bool()])
    monkeypatch.setattr(
        "distill_kd.batch_logits.global_rows", lambda rows: torch.cat([rows, next(others)])
    )
    found = SKDLoss(gather="all")(student[:2], teacher[:2], targets[:2], mask[:2])
    assert next(others, None) is None
    torch.testing.assert_close(found, SKDLoss()(student, teacher, targets, mask))


@each_mask
@pytest.mark.parametrize("hole", [1e4, math.nan])
def test_samples_that_do_not_count_are_as_if_they_were_not_there(hole, masks):
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)
    targets = torch.tensor([0, -100, 2, 3, 4, 0])
    student[[1, 4]] = hole
    student.requires_grad_()
    kept = [0, 2, 3, 5]
    loss = SKDLoss(masks=masks)
    mask = torch.tensor([1, 1, 1, 1, 0, 1])

    found = loss(student, teacher, targets, mask)
    expected = loss(student[kept], teacher[kept], targets[kept])

    torch.testing.assert_close(found, expected)
    gradient, wanted = (torch.autograd.grad(value, student)[0] for value in (found, expected))
    torch.testing.assert_close(gradient[kept], wanted[kept])
    assert gradient[[1, 4]].eq(0).all()


@each_mask
def test_where_nothing_counts_the_loss_is_zero(masks):
    student = logits(3, 4).requires_grad_()
    loss = SKDLoss(masks=masks)(student, logits(3, 4, seed=1), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


@pytest.mark.parametrize(("dims", "class_dim"), [((0, 3, 1, 2), None), ((0, 1, 2, 3), -1)])
def test_of_dense_logits_each_position_is_a_sample(dims, class_dim):
    student, teacher = logits(2, 2, 3, 5, seed=1), logits(2, 2, 3, 5, seed=2)
    targets = torch.arange(12).reshape(2, 2, 3) % 5
    dense = [side.permute(dims) for side in (student, teacher)]
    found = SKDLoss(class_dim=class_dim)(*dense, targets)
    rows = [side.reshape(12, 5) for side in (student, teacher)]
    torch.testing.assert_close(found, SKDLoss()(*rows, targets.reshape(12)))


@each_mask
def test_a_one_hot_teacher_and_huge_logits_give_finite_numbers(masks):
    student = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, -1e4], [-1e4, 1e4, -1e4]])
    loss = SKDLoss(masks=masks)(student, teacher, torch.tensor([2, 1]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_nan_logits_are_not_hidden():
    student = logits(2, 3)
    student[0, 0] = math.nan
    assert SKDLoss()(student, logits(2, 3, seed=1)).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student = logits(8, 10, seed=1).to(dtype).requires_grad_()
    teacher = logits(8, 10, seed=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SKDLoss()(student, teacher)
    loss.backward()
    exact = SKDLoss()(student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.dtype == dtype


class TestSKDLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return SKDLoss(scale_by_classes=False)

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be a finite number > 0, got 0\.0"),
        ({"alpha": -1.0}, r"alpha must be a finite number >= 0, got -1\.0"),
        ({"gamma": math.inf}, "gamma must be a finite number >= 0, got inf"),
        ({"tikhonov": 0.0}, r"tikhonov must be a finite number > 0, got 0\.0"),
        ({"masks": "rows"}, "masks must be one of 'share', 'samples', 'none', got 'rows'"),
        ({"gather": "some"}, "gather must be one of 'none', 'all', got 'some'"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=f"SKDLoss: {message}"):
        SKDLoss(**params)


def test_more_samples_than_can_be_related_are_refused():
    many = torch.zeros(1, 2, 65, 64)
    message = "SKDLoss relates every two samples to each other, at most 4,096; got 4,160; pool"
    with pytest.raises(ValueError, match=message):
        SKDLoss()(many, many)


def test_printing_shows_every_parameter():
    assert repr(SKDLoss(2.0, masks="none")) == (
        "SKDLoss(temperature=2.0, alpha=0.5, beta=0.5, gamma=0.5, tikhonov=0.1, "
        "scale_by_classes=True, masks='none', gather='none', ignore_index=-100, class_dim=None)"
    )


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.skd)
    assert results.attempted > 0
    assert results.failed == 0
