"""SRDLoss and SRDProjector: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.simple_recipe import SRDLoss, SRDProjector

METHOD = "srd"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normalized(features, eps):
    """Return columns with mean 0 and variance 1, as lists of numbers."""
    columns = []
    for column in features.T.tolist():
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append([(value - mean) / math.sqrt(variance + eps) for value in column])
    return columns


def log_distance(student, teacher, exponent, eps=1e-4):
    """Return the feature term of one layer of vectors, without its weight."""
    columns = zip(normalized(student, eps), normalized(teacher, eps), strict=True)
    pairs = [pair for column in columns for pair in zip(*column, strict=True)]
    return math.log(sum(abs(s - t) ** exponent for s, t in pairs))


def divergence(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        ours, theirs = ([math.exp(x / temperature) for x in row] for row in (s, t))
        for q, p in zip(ours, theirs, strict=True):
            p, q = p / sum(theirs), q / sum(ours)
            total += p * math.log(p / q)
    return total


class TestSRDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return SRDLoss()

    def tensors(self, batch):
        names = ("student_features", "teacher_features", "student", "teacher")
        return {name: torch.randn(batch, 5) for name in names}


class TestSRDLossWithoutNorm(TestSRDLoss):
    def make(self):
        return SRDLoss(normalize=False)


def test_loss_and_gradients_equal_the_reference(reference):
    logits = reference.tensor("student_logits"), reference.tensor("teacher_logits")
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    if reference.variant == "default":
        loss = SRDLoss(**reference.params, normalize=False)
        reference.check(loss(student, teacher, *logits))
        return
    projector = SRDProjector()
    projector.setup(student, teacher)
    names = list(reference.state("linear"))
    reference.load("linear", projector, {name: f"layers.0.{name}" for name in names})
    reference.check(SRDLoss(**reference.params)(projector(student), teacher, *logits))


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize(("exponent", "temperature"), [(4.0, 1.0), (1.5, 3.0), (2.0, 0.5)])
def test_equals_the_formula_written_out(exponent, temperature, reduction):
    students = [draw(5, 3, seed=1), draw(5, 4, seed=2)]
    teachers = [draw(5, 3, seed=3), draw(5, 4, seed=4)]
    logits = draw(5, 7, seed=5), draw(5, 7, seed=6)
    loss = SRDLoss(exponent, 0.7, 1.3, temperature, reduction=reduction)

    pairs = zip(students, teachers, strict=True)
    features = sum(log_distance(*pair, exponent) for pair in pairs)
    soft = divergence(*logits, temperature) / {"batchmean": 5, "mean": 35, "sum": 1}[reduction]
    value = loss(students, teachers, *logits)
    assert value.item() == pytest.approx(0.7 * features + 1.3 * soft, rel=1e-10)


def test_the_normalisation_is_torchs_batch_norm_in_train_mode():
    student, teacher = draw(5, 3, seed=1), 7 + 100 * draw(5, 3, seed=2)
    for training in (True, False):
        loss = SRDLoss(kl_weight=0.0, norm_eps=0.3).train(training)
        ours, theirs = (
            F.batch_norm(features, None, None, training=True, eps=0.3)
            for features in (student, teacher)
        )
        plain = SRDLoss(kl_weight=0.0, normalize=False)
        torch.testing.assert_close(loss(student, teacher), plain(ours, theirs))


def test_maps_are_averaged_over_their_positions():
    student, teacher = draw(4, 3, 2, 5, seed=1), draw(4, 3, 6, 6, seed=2)
    loss = SRDLoss(kl_weight=0.0)
    averaged = loss(student.mean((2, 3)), teacher.mean((2, 3)))
    torch.testing.assert_close(loss(student, teacher), averaged)


def test_identical_features_give_the_guards_logarithm_and_no_gradient():
    student = draw(4, 3).requires_grad_()
    loss = SRDLoss(kl_weight=0.0)(student, student.detach().clone())
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(1e-12))
    assert not student.grad.any()


@pytest.mark.parametrize("exponent", [1.0, 1.5, 4.0])
def test_features_equal_in_places_give_finite_gradients(exponent):
    student = draw(4, 3, seed=1)
    teacher = student.clone()
    teacher[:, 0] += draw(4, seed=2)
    student.requires_grad_()
    SRDLoss(exponent, kl_weight=0.0)(student, teacher).backward()
    assert student.grad.isfinite().all()


def test_without_a_kl_weight_logits_are_not_looked_at():
    student, teacher = draw(4, 3, seed=1), draw(4, 3, seed=2)
    loss = SRDLoss(kl_weight=0.0)
    nonsense = torch.full((1, 2), math.nan)
    torch.testing.assert_close(loss(student, teacher, nonsense), loss(student, teacher))


def test_missing_logits_are_refused():
    with pytest.raises(ValueError, match="logits of student and teacher are needed"):
        SRDLoss()(draw(4, 3), draw(4, 3), draw(4, 7))


def test_a_class_that_the_teacher_excludes_keeps_the_loss_finite():
    student, teacher = draw(4, 5, seed=1).requires_grad_(), draw(4, 5, seed=2)
    teacher[:, 2] = -math.inf
    loss = SRDLoss()(draw(4, 3), draw(4, 3, seed=1), student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_is_within_a_percent():
    tensors = [draw(16, 8, seed=seed) for seed in range(4)]
    rounded = SRDLoss()(*(tensor.bfloat16() for tensor in tensors))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(SRDLoss()(*tensors).item(), rel=0.01)


def test_the_projector_is_a_linear_layer_of_the_averaged_map():
    student = draw(4, 3, 2, 5, seed=1)
    projector = SRDProjector(3, 6)
    projector.setup(student, draw(4, 6))
    weight, bias = projector.parameters()
    torch.testing.assert_close(projector(student), F.linear(student.mean((2, 3)), weight, bias))
    torch.testing.assert_close(projector(student.mean((2, 3))), projector(student))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"exponent": 0.5}, r"SRDLoss: exponent must be a finite number >= 1, got 0\.5"),
        ({"feature_weight": -1.0}, r"SRDLoss: feature_weight must be .* >= 0, got -1\.0"),
        ({"kl_weight": math.inf}, r"SRDLoss: kl_weight must be .* got inf"),
        ({"temperature": 0.0}, r"SRDLoss: temperature must be a finite number > 0, got 0\.0"),
        ({"norm_eps": 0.0}, r"SRDLoss: norm_eps must be a finite number > 0, got 0\.0"),
        ({"reduction": "none"}, r"SRDLoss: reduction must be one of 'batchmean', 'mean', 'sum'"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        SRDLoss(**params)


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 5\).*SRDProjector"):
        SRDLoss(kl_weight=0.0)(torch.zeros(2, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"student \(2, 4\) and teacher \(2, 1\).*same classes"):
        SRDLoss()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"SRDLoss: features must be maps .* got \(2, 3, 4\)"):
        SRDLoss(kl_weight=0.0)(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"SRDProjector: features must be maps .* \(2, 3, 4\)"):
        SRDProjector(3, 5)(torch.zeros(2, 3, 4))


def test_printing_shows_every_parameter():
    assert repr(SRDLoss()) == (
        "SRDLoss(exponent=4.0, feature_weight=2.0, kl_weight=1.0, temperature=1.0, "
        "normalize=True, norm_eps=0.0001, reduction='batchmean')"
    )
