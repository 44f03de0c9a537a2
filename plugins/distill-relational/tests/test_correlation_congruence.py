"""CCKDLoss and CCKDEmbedding: reference numbers, the formulas written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_relational import CCKDEmbedding, CCKDLoss

METHOD = "cckd"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def correlations(rows, normalize, kernel, gamma, max_p):
    if normalize:
        rows = [[value / math.sqrt(dot(row, row)) for value in row] for row in rows]
    products = [[dot(a, b) for b in rows] for a in rows]
    if kernel == "bilinear":
        return products
    powers = range(max_p + 1)
    return [
        [
            math.exp(-2 * gamma)
            * sum((2 * gamma) ** p / math.factorial(p) * product**p for p in powers)
            for product in row
        ]
        for row in products
    ]


def squares_by_hand(student, teacher, normalize, kernel="gaussian", gamma=0.4, max_p=2):
    sides = (
        correlations(side.tolist(), normalize, kernel, gamma, max_p) for side in (student, teacher)
    )
    rows = zip(*sides, strict=True)
    return sum((s - t) ** 2 for pair in rows for s, t in zip(*pair, strict=True))


class TestCCKDLoss(LossConformance):
    student = "student_features"

    def make(self):
        return CCKDLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 5) for name in ("student_features", "teacher_features")}

    def test_loss_and_gradient_are_finite_where_both_sides_are_equal(self):
        given = self._tensors()
        given["teacher_features"] = given["student_features"].clone()
        self._assert_finite(given)


class TestCCKDLossOfTorchdistill(TestCCKDLoss):
    def make(self):
        return CCKDLoss("torchdistill", gamma=0.1)

    def test_reduced_precision_is_close_to_full(self):
        """Squares of large products lose more than rounding elsewhere; see below."""


class TestCCKDLossOfTheAuthorsCode(TestCCKDLoss):
    def make(self):
        return CCKDLoss("code")


def test_loss_and_gradients_equal_the_reference(reference):
    form = {"normalized_mse": "paper", "torchdistill": "torchdistill"}[reference.variant]
    features = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    reference.check(CCKDLoss(form, **reference.params)(*features))


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
@pytest.mark.parametrize(("gamma", "max_p"), [(0.4, 2), (0.9, 1), (0.2, 5)])
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_equals_the_formula_written_out(kernel, gamma, max_p, reduction):
    student, teacher = draw(5, 3, seed=1), draw(5, 4, seed=2)
    series = (kernel, gamma, max_p)
    count = {"batchmean": 25, "sum": 1}[reduction]
    for form in ("paper", "torchdistill"):
        squares = squares_by_hand(student, teacher, form == "paper", *series)
        expected = (squares if form == "paper" else math.sqrt(squares)) / count
        loss = CCKDLoss(form, *series, reduction=reduction)
        assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_normalisation_can_be_chosen_against_the_form():
    student, teacher = draw(5, 3, seed=1), draw(5, 4, seed=2)
    plain = CCKDLoss(normalize=False)(student, teacher)
    assert plain.item() == pytest.approx(squares_by_hand(student, teacher, False) / 25)
    units = CCKDLoss("torchdistill", normalize=True)(student, teacher)
    assert units.item() == pytest.approx(math.sqrt(squares_by_hand(student, teacher, True)) / 25)


def test_the_authors_code_multiplies_differences_of_neighbours():
    student, teacher = draw(5, 3, seed=1), draw(5, 3, seed=2)
    apart = [
        [abs(a - b) for a, b in zip(s, t, strict=True)]
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    total = sum(dot(apart[i], apart[i + 1]) for i in range(4))
    assert CCKDLoss("code")(student, teacher).item() == pytest.approx(total / 4)
    assert CCKDLoss("code", reduction="sum")(student, teacher).item() == pytest.approx(total)


def test_the_authors_code_gives_the_value_of_repdistiller():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    rows, columns = rows.double(), columns.double()
    student, teacher = (0.6 * rows + 0.8 * columns).sin(), (0.4 * rows + 0.9 * columns).cos()
    assert CCKDLoss("code")(student, teacher).item() == pytest.approx(4.697882, abs=1e-6)


@pytest.mark.parametrize("form", ["paper", "torchdistill", "code"])
def test_both_sides_get_a_gradient(form):
    student, teacher = draw(5, 3, seed=1).requires_grad_(), draw(5, 3, seed=2).requires_grad_()
    CCKDLoss(form)(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad.abs().sum() > 0
    swapped = torch.autograd.grad(CCKDLoss(form)(teacher, student), student)[0]
    torch.testing.assert_close(swapped, student.grad)


@pytest.mark.parametrize("form", ["paper", "torchdistill", "code"])
@pytest.mark.parametrize("batch", [1, 4])
def test_identical_embeddings_give_0_without_a_gradient(form, batch):
    student = draw(batch, 3).requires_grad_()
    loss = CCKDLoss(form)(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_a_vector_of_zeros_gets_no_gradient_that_explodes():
    student, teacher = draw(4, 3, seed=1), draw(4, 3, seed=2)
    student[1] = 0
    student.requires_grad_()
    CCKDLoss()(student, teacher).backward()
    assert not student.grad[1].any()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("form", ["paper", "torchdistill", "code"])
def test_half_precision_is_within_a_percent(form):
    student, teacher = draw(16, 8, seed=1), draw(16, 8, seed=2)
    rounded = CCKDLoss(form)(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(CCKDLoss(form)(student, teacher).item(), rel=0.01)


def test_the_embedding_is_a_linear_layer_of_what_it_is_set_up_with():
    features = draw(4, 3, 2, 2, dtype=torch.float32)
    embedding = CCKDEmbedding()
    embedding.setup(features)
    weight, bias = embedding.parameters()
    assert weight.shape == (128, 12)
    expected = F.linear(features.flatten(1), weight, bias)
    torch.testing.assert_close(embedding(features), expected)
    assert "in_features=12, out_features=128" in repr(embedding)


def test_an_embedding_with_known_shapes_needs_no_setup():
    assert CCKDEmbedding(6, 3)(torch.zeros(4, 6)).shape == (4, 3)


def test_an_embedding_takes_the_type_of_wide_features():
    embedding = CCKDEmbedding()
    embedding.setup(draw(2, 3))
    assert embedding(draw(4, 3)).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (CCKDLoss, {"form": "x"}, "form must be one of 'paper', 'torchdistill', 'code', got 'x'"),
        (CCKDLoss, {"kernel": "x"}, "kernel must be one of 'gaussian', 'bilinear', got 'x'"),
        (CCKDLoss, {"gamma": 0.0}, r"gamma must be a finite number > 0, got 0\.0"),
        (CCKDLoss, {"max_p": 0}, "max_p must be a whole number >= 1, got 0"),
        (CCKDLoss, {"reduction": "mean"}, "reduction must be one of 'batchmean', 'sum', got"),
        (CCKDLoss, {"gather": "x"}, "gather must be one of 'none', 'all', got 'x'"),
        (CCKDEmbedding, {"in_features": 0}, "in_features must be a whole number >= 1, or None"),
        (CCKDEmbedding, {"out_features": 0}, "out_features must be a whole number >= 1, got 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, params, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(**params)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"CCKDLoss: student \(2, 3\) and teacher \(4, 3\) must"):
        CCKDLoss()(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher \(2, 4\) must be equally wide"):
        CCKDLoss("code")(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"in_features is 5, but features .* \(2, 3\) have 3"):
        CCKDEmbedding(5)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"in_features is 5, but features .* \(2, 3\) have 3"):
        CCKDEmbedding(5).setup(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="CCKDEmbedding has no layer yet: call setup"):
        CCKDEmbedding()(torch.zeros(2, 3))


def test_printing_shows_every_parameter():
    assert repr(CCKDLoss()) == (
        "CCKDLoss(form='paper', kernel='gaussian', gamma=0.4, max_p=2, normalize=None, "
        "reduction='batchmean', gather='none')"
    )
