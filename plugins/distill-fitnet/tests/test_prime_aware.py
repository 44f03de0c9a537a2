"""PADLoss and PADVariance: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.testing import LossConformance
from distill_fitnet.prime_aware import PADLoss, PADVariance

METHOD = "pad_l2"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestPADLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return PADLoss()

    def tensors(self, batch):
        names = ("student_features", "teacher_features", "log_variance")
        return {name: torch.randn(batch, 5) for name in names}


def test_loss_and_gradients_equal_the_reference(reference):
    loss = PADLoss(**reference.params)
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    if reference.variant == "default":
        reference.check(loss(student, teacher, reference.tensor("log_variance")))
        return
    estimator = PADVariance()
    estimator.setup(student)
    names = list(reference.state("var_estimator"))
    reference.load("var_estimator", estimator, {name: f"layers.0.{name}" for name in names})
    reference.check(loss(student, teacher, estimator(student)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)])
def test_equals_the_formula_written_out(shape, eps, reduction):
    student, teacher = draw(*shape, seed=1), draw(*shape, seed=2)
    variance = draw(shape[0], math.prod(shape[1:]), seed=3)
    samples = []
    for s, t, v in zip(student.flatten(1), teacher.flatten(1), variance, strict=True):
        rows = zip(s.tolist(), t.tolist(), v.tolist(), strict=True)
        terms = [(t - s) ** 2 / (eps + math.exp(v)) + v for s, t, v in rows]
        samples.append(sum(terms) / len(terms))
    expected = sum(samples) / (len(samples) if reduction == "mean" else 1)
    loss = PADLoss(eps, reduction)(student, teacher, variance)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_layers_are_summed():
    students, teachers, variances = (
        [draw(3, 4, seed=seed), draw(3, 5, seed=seed + 1)] for seed in (1, 3, 5)
    )
    single = [PADLoss()(*layer) for layer in zip(students, teachers, variances, strict=True)]
    torch.testing.assert_close(PADLoss()(students, teachers, variances), sum(single))


@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_log_variances_give_finite_gradients(value):
    student = draw(3, 4, seed=1, dtype=torch.float32).requires_grad_()
    variance = torch.full((3, 4), value, requires_grad=True)
    loss = PADLoss()(student, draw(3, 4, seed=2, dtype=torch.float32), variance)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert variance.grad.isfinite().all()


def test_the_best_variance_is_the_squared_distance():
    student, teacher = draw(3, 4, seed=1), draw(3, 4, seed=2)
    variance = (student - teacher).square().log().requires_grad_()
    PADLoss(eps=0.0)(student, teacher, variance).backward()
    assert variance.grad.abs().max() < 1e-12


def test_half_precision_is_within_a_percent():
    student, teacher, variance = (draw(8, 16, seed=seed) for seed in (1, 2, 3))
    rounded = PADLoss()(student.bfloat16(), teacher.bfloat16(), variance.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(PADLoss()(student, teacher, variance).item(), rel=0.01)


def test_the_variance_is_a_linear_layer_and_a_batch_norm_of_the_flat_embedding():
    embedding = draw(4, 3, 1, 2, seed=1)
    estimator = PADVariance(6).double()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.BatchNorm1d(6)).double()
    state = estimator.state_dict()
    plain.load_state_dict(
        {name.replace("layers.0.0", "1").replace("layers.0.1", "2"): v for name, v in state.items()}
    )
    torch.testing.assert_close(estimator(embedding), plain(embedding))


def test_the_variance_has_the_length_of_like_if_there_is_one():
    estimator = PADVariance()
    estimator.setup(draw(4, 3), draw(4, 7))
    assert estimator(draw(4, 3).float()).shape == (4, 7)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"eps": -1.0}, r"PADLoss: eps must be a finite number >= 0, got -1\.0"),
        ({"eps": math.nan}, r"PADLoss: eps .* got nan"),
        ({"reduction": "none"}, r"PADLoss: reduction must be one of 'mean', 'sum', got 'none'"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        PADLoss(**params)


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 5\)"):
        PADLoss()(torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"log_variance \(2, 1\) .* features \(2, 3\)"):
        PADLoss()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="1 log variances for 2 layers"):
        PADLoss()([torch.zeros(2, 3)] * 2, [torch.zeros(2, 3)] * 2, torch.zeros(2, 3))


def test_printing_shows_every_parameter():
    assert repr(PADLoss()) == "PADLoss(eps=1e-06, reduction='mean')"
