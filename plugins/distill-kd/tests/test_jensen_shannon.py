"""JensenShannonLoss: the formula written out, its ends, layouts, parts, and extremes."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

import distill_kd.jensen_shannon
from distill.testing import LossConformance
from distill_kd import KDLoss
from distill_kd import logits as logits_module
from distill_kd.jensen_shannon import JensenShannonLoss

each_beta = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def divergence_by_hand(student, teacher, beta, temperature):
    """Return that of one position, from probabilities."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    mixture = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


@each_beta
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(
    ("reduction", "divisor"), [("positionmean", 5), ("batchmean", 2), ("sum", 1)]
)
def test_equals_the_formula_written_out(beta, scale, reduction, divisor):
    student, teacher = logits(2, 3, 7, seed=1), logits(2, 3, 7, seed=2)
    targets = torch.tensor([[0, 1, 2], [3, -100, 5]])
    positions = [
        divergence_by_hand(s, t, beta, 1.7)
        for s, t, y in zip(
            student.reshape(6, 7).tolist(),
            teacher.reshape(6, 7).tolist(),
            targets.flatten().tolist(),
            strict=True,
        )
        if y != -100
    ]
    expected = sum(positions) / divisor * (1.7**2 if scale else 1)

    loss = JensenShannonLoss(beta, 1.7, scale, reduction)(student, teacher, targets)

    assert loss.item() == pytest.approx(expected, rel=1e-10)


@each_beta
def test_gradient_equals_finite_differences(beta):
    student, teacher = logits(2, 3, 4, seed=3).requires_grad_(), logits(2, 3, 4, seed=4)
    loss = JensenShannonLoss(beta, 1.5)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


def test_the_forward_divergence_is_kd_without_labels():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    loss = JensenShannonLoss(0.0, 4.0, scale_by_temperature=True)
    torch.testing.assert_close(loss(student, teacher), KDLoss(4.0, 0.0)(student, teacher))


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.8])
def test_exchanging_sides_exchanges_their_parts(beta):
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    one, other = JensenShannonLoss(beta), JensenShannonLoss(1 - beta)
    torch.testing.assert_close(one(student, teacher), other(teacher, student))


@pytest.mark.parametrize(("near", "end"), [(1e-6, 0.0), (1 - 1e-6, 1.0)])
def test_near_the_ends_it_is_in_proportion_to_them(near, end):
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    found = JensenShannonLoss(near)(student, teacher) / min(near, 1 - near)
    torch.testing.assert_close(found, JensenShannonLoss(end)(student, teacher), rtol=1e-4, atol=0.0)


def test_it_is_log_2_where_nothing_is_shared():
    student = torch.tensor([[1e4, 0.0]], requires_grad=True)
    loss = JensenShannonLoss()(student, torch.tensor([[0.0, 1e4]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.grad.isfinite().all()


@each_beta
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_identical_logits_give_zero_and_no_gradient(beta, dtype, rounding):
    student = logits(5, 6, dtype=dtype).requires_grad_()
    loss = JensenShannonLoss(beta)(student, student.detach().clone())
    loss.backward()
    assert abs(loss.item()) < rounding
    assert student.grad.abs().max() < rounding


@each_beta
@pytest.mark.parametrize("reduction", ["positionmean", "batchmean", "sum"])
def test_parts_give_the_same_loss_and_gradient_as_the_whole(beta, reduction, monkeypatch):
    student, teacher = logits(2, 4, 5, seed=1), logits(2, 4, 5, seed=2)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    results = []
    for at_once in (2**25, 12):
        monkeypatch.setattr(logits_module, "AT_ONCE", at_once)
        given = student.clone().requires_grad_()
        loss = JensenShannonLoss(beta, 2.0, reduction=reduction)(given, teacher, mask=mask)
        results.append((loss, *torch.autograd.grad(loss, given)))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_of_dense_logits_the_classes_are_in_dimension_1():
    student, teacher = logits(2, 3, 4, 5, seed=1), logits(2, 3, 4, 5, seed=2)
    targets = torch.arange(24).reshape(2, 3, 4) % 5
    dense = (side.permute(0, 3, 1, 2) for side in (student, teacher))
    found = JensenShannonLoss(ignore_index=0)(*dense, targets)
    rows = (side.reshape(24, 5) for side in (student, teacher))
    expected = JensenShannonLoss(ignore_index=0)(*rows, targets.flatten())
    torch.testing.assert_close(found, expected)


@each_beta
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_positions_that_do_not_count_may_hold_anything(beta, hole):
    student, teacher = logits(1, 3, 4, seed=1), logits(1, 3, 4, seed=2)
    student[0, 1] = hole
    targets = torch.tensor([[2, -100, 1]])
    found = JensenShannonLoss(beta)(student, teacher, targets)
    kept = [0, 2]
    torch.testing.assert_close(found, JensenShannonLoss(beta)(student[:, kept], teacher[:, kept]))


@each_beta
@pytest.mark.parametrize("reduction", ["positionmean", "batchmean", "sum"])
def test_where_nothing_counts_the_loss_is_zero(beta, reduction):
    student = logits(2, 3, 4).requires_grad_()
    loss = JensenShannonLoss(beta, reduction=reduction)(
        student, logits(2, 3, 4, seed=1), torch.full((2, 3), -100)
    )
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


@each_beta
@pytest.mark.parametrize("low", [-1e4, -math.inf])
def test_a_one_hot_teacher_and_huge_logits_give_finite_numbers(beta, low):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.3, 0.2, 0.1]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, 1e4], [low, 0.0, low]])
    if beta == 1 and math.isinf(low):
        pytest.skip("the reverse divergence from what the teacher excludes is infinite")
    loss = JensenShannonLoss(beta)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_nan_logits_are_not_hidden():
    student = logits(2, 3)
    student[0, 0] = math.nan
    assert JensenShannonLoss()(student, logits(2, 3, seed=1)).isnan()


@each_beta
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(beta, dtype):
    student = logits(8, 10, seed=1).to(dtype).requires_grad_()
    teacher = logits(8, 10, seed=2).to(dtype)
    loss = JensenShannonLoss(beta)(student, teacher)
    loss.backward()
    exact = JensenShannonLoss(beta)(student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.dtype == dtype


class TestJensenShannonLoss(LossConformance):
    teacher = "teacher"
    beta = 0.5

    def make(self):
        return JensenShannonLoss(self.beta)

    def tensors(self, batch):
        return {"student": torch.randn(batch, 3, 5), "teacher": torch.randn(batch, 3, 5)}


class TestForwardDivergence(TestJensenShannonLoss):
    beta = 0.0


class TestReverseDivergence(TestJensenShannonLoss):
    beta = 1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beta": 1.5}, r"beta must be within \[0, 1\], got 1\.5"),
        ({"beta": math.nan}, "beta .* got nan"),
        ({"temperature": 0.0}, r"temperature must be a finite number > 0, got 0\.0"),
        (
            {"reduction": "mean"},
            "reduction must be one of 'positionmean', 'batchmean', 'sum', got 'mean'",
        ),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=f"JensenShannonLoss: {message}"):
        JensenShannonLoss(**params)


def test_labels_that_do_not_fit_are_refused_with_their_shapes():
    with pytest.raises(ValueError, match=r"JensenShannonLoss: targets .* \(2, 3\).* got \(2, 4\)"):
        JensenShannonLoss()(logits(2, 3, 5), logits(2, 3, 5), torch.zeros(2, 4).long())


def test_printing_shows_every_parameter():
    assert repr(JensenShannonLoss(0.1)) == (
        "JensenShannonLoss(beta=0.1, temperature=1.0, scale_by_temperature=False, "
        "reduction='positionmean', ignore_index=-100, standardize=False, class_dim=None)"
    )


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.jensen_shannon)
    assert results.attempted > 0
    assert results.failed == 0
