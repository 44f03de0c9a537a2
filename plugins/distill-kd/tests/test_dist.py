"""DISTLoss: correlations written out, identities, extremes, and what it refuses."""

from __future__ import annotations

import doctest
import math
from itertools import product

import pytest
import torch

import distill_kd.dist
from distill.testing import LossConformance
from distill_kd import DISTLoss

each_form = pytest.mark.parametrize("eps_form", ["clamped", "added"])


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def correlation_by_hand(a, b, eps, eps_form):
    a, b = [x - sum(a) / len(a) for x in a], [x - sum(b) / len(b) for x in b]
    lengths = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    if eps_form == "clamped":
        divisor = max(lengths[0], eps) * max(lengths[1], eps)
    else:
        divisor = lengths[0] * lengths[1] + eps
    return sum(x * y for x, y in zip(a, b, strict=True)) / divisor


def terms_by_hand(student, teacher, temperature=1.0, eps=1e-8, eps_form="clamped"):
    """Return the inter-class and the intra-class term, without their weights and T^2."""
    s, t = ([softmax(row, temperature) for row in x.tolist()] for x in (student, teacher))
    inter = [correlation_by_hand(a, b, eps, eps_form) for a, b in zip(s, t, strict=True)]
    columns = zip(zip(*s, strict=True), zip(*t, strict=True), strict=True)
    intra = [correlation_by_hand(list(a), list(b), eps, eps_form) for a, b in columns]
    return 1 - sum(inter) / len(inter), 1 - sum(intra) / len(intra)


@each_form
@pytest.mark.parametrize(("beta", "gamma"), [(0.3, 1.7), (0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize(
    ("shape", "temperature"), list(product([(2, 2), (3, 7), (6, 4)], [0.7, 4]))
)
def test_equals_the_formula_written_out(shape, temperature, beta, gamma, eps_form):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    inter, intra = terms_by_hand(student, teacher, temperature, 0.02, eps_form)

    loss = DISTLoss(temperature, beta, gamma, eps=0.02, eps_form=eps_form)(student, teacher)

    expected = temperature * temperature * (beta * inter + gamma * intra)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@each_form
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_gradient_equals_finite_differences(temperature, eps_form):
    student, teacher = logits(4, 5, seed=3).requires_grad_(), logits(4, 5, seed=4)
    loss = DISTLoss(temperature, 0.4, 1.3, eps=0.01, eps_form=eps_form)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_identical_logits_give_zero_and_no_gradient(dtype, rounding, temperature):
    student = logits(5, 6, dtype=dtype).requires_grad_()
    loss = DISTLoss(temperature)(student, student.detach().clone())
    loss.backward()
    assert abs(loss.item()) < temperature**2 * rounding
    assert student.grad.abs().max() < temperature**2 * rounding


def test_the_added_eps_leaves_out_classes_that_hardly_vary():
    probabilities = torch.tensor([[0.6, 0.4 - 1e-6, 1e-6], [0.3, 0.7 - 2e-6, 2e-6]]).double()
    student = probabilities.log()
    assert abs(DISTLoss()(student, student).item()) < 1e-8
    loss = DISTLoss(beta=0.0, eps_form="added")(student, student)
    assert loss.item() == pytest.approx(1 / 3, rel=1e-3)


def test_probabilities_on_a_line_with_the_teacher_s_give_zero():
    """What DIST is for: a student less certain than its teacher is not asked to be as certain."""
    probabilities = logits(6, 5).softmax(1)
    mild = 0.7 / 5 + 0.3 * probabilities
    loss = DISTLoss()(mild.log(), probabilities.log())
    assert abs(loss.item()) < 1e-12


def test_opposite_probabilities_give_the_largest_loss():
    probabilities = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    loss = DISTLoss(2.0, 0.5, 3.0)(2 * probabilities.log(), 2 * probabilities.flip(1).log())
    assert loss.item() == pytest.approx(4 * (0.5 * 2 + 3.0 * 2))


def test_adding_a_constant_to_a_sample_s_logits_changes_nothing():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    shift = torch.tensor([[7.0], [-3.0], [100.0]])
    torch.testing.assert_close(
        DISTLoss()(student + shift, teacher - shift), DISTLoss()(student, teacher)
    )


def test_the_intra_class_term_alone_depends_on_which_samples_are_in_the_batch():
    student, teacher = logits(6, 5, seed=1), logits(6, 5, seed=2)

    def halves(loss):
        return (loss(student[:3], teacher[:3]) + loss(student[3:], teacher[3:])) / 2

    inter, intra = DISTLoss(gamma=0.0), DISTLoss(beta=0.0)
    torch.testing.assert_close(halves(inter), inter(student, teacher))
    assert (halves(intra) - intra(student, teacher)).abs() > 1e-3


@each_form
def test_a_batch_of_one_has_a_constant_intra_class_term(eps_form):
    student, teacher = logits(1, 5, seed=1).requires_grad_(), logits(1, 5, seed=2)
    loss = DISTLoss(3.0, 0.5, 2.0, eps_form=eps_form)(student, teacher)
    inter, _ = terms_by_hand(student, teacher, 3.0, eps_form=eps_form)
    assert loss.item() == pytest.approx(9 * (0.5 * inter + 2.0))
    (gradient,) = torch.autograd.grad(loss, student)
    inter_alone = DISTLoss(3.0, 0.5, 0.0, eps_form=eps_form)(student, teacher)
    torch.testing.assert_close(gradient, *torch.autograd.grad(inter_alone, student))


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (48, 100), (6, 1000)])
def test_equal_logits_of_a_sample_correlate_with_nothing(shape, dtype, eps_form):
    """As of a student whose last layer starts with zeros; the mean of equal numbers is rounded."""
    student, teacher = torch.full(shape, 0.3, dtype=dtype), logits(*shape, dtype=dtype)
    student.requires_grad_()
    for pair in ((student, teacher), (student + teacher, teacher.new_zeros(shape))):
        loss = DISTLoss(eps_form=eps_form)(*pair)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 2.0
        assert gradient.eq(0).all()


def test_a_sample_that_does_not_vary_leaves_the_others_their_gradient():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    student[1] = 0.3
    student.requires_grad_()
    DISTLoss(gamma=0.0)(student, teacher).backward()
    assert student.grad[1].eq(0).all()
    assert student.grad[[0, 2]].ne(0).all()


@each_form
@pytest.mark.parametrize("low", [-1e4, -math.inf])
def test_a_one_hot_teacher_gives_finite_numbers(low, eps_form):
    student = logits(4, 5, dtype=torch.float32).requires_grad_()
    teacher = torch.full((4, 5), low)
    teacher[torch.arange(4), torch.tensor([2, 0, 2, 3])] = 0.0
    loss = DISTLoss(eps_form=eps_form)(student, teacher)
    loss.backward()
    inter, intra = terms_by_hand(student.detach(), teacher, eps_form=eps_form)
    # Classes 1 and 4 are nobody's, so they correlate with nothing.
    assert loss.item() == pytest.approx(inter + intra, rel=1e-5)
    assert intra > 2 / 5
    assert student.grad.isfinite().all()


@each_form
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_huge_logits_stay_finite(temperature, eps_form):
    student = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, 1e4], [-1e4, 1e4, 0.0]])
    loss = DISTLoss(temperature, eps_form=eps_form)(student, teacher)
    loss.backward()
    # Samples correlate by -1/2 and 1, classes by 0, which is 0 / 0 in two of them, and 1.
    assert loss.item() == pytest.approx(temperature**2 * (0.75 + 2 / 3))
    assert student.grad.isfinite().all()


def test_nan_logits_are_not_hidden():
    student = logits(2, 3)
    student[0, 0] = math.nan
    assert DISTLoss()(student, logits(2, 3, seed=1)).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student = logits(8, 10, seed=1).to(dtype).requires_grad_()
    teacher = logits(8, 10, seed=2).to(dtype)
    loss = DISTLoss(2.0)(student, teacher)
    loss.backward()
    exact = DISTLoss(2.0)(student.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast_the_loss_is_within_one_percent(given):
    student, teacher = (logits(8, 10, seed=n, dtype=torch.float32) for n in (1, 2))
    expected = DISTLoss(4.0)(student, teacher).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DISTLoss(4.0)(student.to(given), teacher.to(given))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6 if given == torch.float32 else 0.01)


def test_teacher_of_another_precision_is_taken():
    student, teacher = logits(4, 5, dtype=torch.float32), logits(4, 5, seed=1)
    torch.testing.assert_close(DISTLoss()(student, teacher), DISTLoss()(student.double(), teacher))


class TestDISTLoss(LossConformance):
    teacher = "teacher"

    def make(self):
        return DISTLoss(4.0)

    def tensors(self, batch):
        return {"student": torch.randn(batch, 5), "teacher": torch.randn(batch, 5)}


class TestDISTLossWithAddedEps(TestDISTLoss):
    def make(self):
        return DISTLoss(eps_form="added")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be a finite number > 0, got 0\.0"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"beta": -1.0}, r"beta must be a finite number >= 0, got -1\.0"),
        ({"gamma": math.inf}, "gamma must be a finite number >= 0, got inf"),
        ({"eps": 0.0}, r"eps must be a finite number > 0, got 0\.0"),
        ({"eps_form": "max"}, "eps_form must be one of 'clamped', 'added', got 'max'"),
        ({"gather": "some"}, "gather must be one of 'none', 'all', got 'some'"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=f"DISTLoss: {message}"):
        DISTLoss(**params)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 10), (4, 100), r"student \(4, 10\) and teacher \(4, 100\)"),
        ((10,), (10,), r"\(B, K\).* got \(10,\)"),
        ((0, 10), (0, 10), r"no empty dimension, got \(0, 10\)"),
    ],
)
def test_logits_that_do_not_fit_are_refused_with_their_shapes(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        DISTLoss()(torch.zeros(student), torch.zeros(teacher))


def test_printing_shows_every_parameter():
    assert repr(DISTLoss(4.0, 2.0, gather="all")) == (
        "DISTLoss(temperature=4.0, beta=2.0, gamma=1.0, eps=1e-08, eps_form='clamped', "
        "gather='all', ignore_index=-100, standardize=False, class_dim=None)"
    )


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.dist)
    assert results.attempted > 0
    assert results.failed == 0
