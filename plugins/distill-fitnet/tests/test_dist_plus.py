"""DISTPlusFeatureLoss: reference numbers with DIST's own terms, and correlations written out."""

from __future__ import annotations

import math

import pytest
import torch

from distill.testing import LossConformance
from distill_fitnet.dist_plus import DISTPlusFeatureLoss

METHOD = "dist_plus"


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pearson(a, b):
    """Return the correlation of two sequences of numbers."""
    a, b = [x - sum(a) / len(a) for x in a], [x - sum(b) / len(b) for x in b]
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def dist(student, teacher, beta, gamma, tau):
    """Return DIST's loss of the logits, whose terms the reference numbers include."""
    probabilities = [(logits / tau).softmax(1) for logits in (student, teacher)]

    def relation(dim):
        first, second = (p - p.mean(dim, keepdim=True) for p in probabilities)
        return 1 - torch.cosine_similarity(first, second, dim).mean()

    return tau**2 * (beta * relation(1) + gamma * relation(0))


def test_reference_numbers_hold(reference):
    params = reference.params
    loss = DISTPlusFeatureLoss(
        params["iota"], params["kappa"], form=reference.variant, eps=params["eps"]
    )
    features = [reference.tensor(f"{side}_feature") for side in ("student", "teacher")]
    logits = [reference.tensor(f"{side}_logits") for side in ("student", "teacher")]
    soft = dist(*logits, *(params[name] for name in ("beta", "gamma", "tau")))
    reference.check(soft + loss(*features))


@pytest.mark.parametrize("form", ["one_minus", "torchdistill"])
@pytest.mark.parametrize("spatial", ["samples", "positions"])
@pytest.mark.parametrize("shape", [(3, 5, 2, 4), (2, 3, 3, 3)])
def test_equals_the_formula_written_out(form, spatial, shape):
    student, teacher = maps(*shape, seed=1), maps(*shape, seed=2)
    columns = [x.movedim(1, -1).flatten(0, 2).tolist() for x in (student, teacher)]
    channel = sum(pearson(s, t) for s, t in zip(*columns, strict=True)) / len(columns[0])
    sums = [x.sum(1).flatten(1) for x in (student, teacher)]
    rows = [(x.T if spatial == "samples" else x).tolist() for x in sums]
    over_space = sum(pearson(s, t) for s, t in zip(*rows, strict=True)) / len(rows[0])

    loss = DISTPlusFeatureLoss(0.7, 1.3, form, spatial)(student, teacher)

    expected = 0.7 * (1 - channel if form == "one_minus" else channel) + 1.3 * (1 - over_space)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_layers_add_up():
    shapes = [(3, 4, 4, 4), (3, 6, 2, 2)]
    students, teachers = ([maps(*s, seed=n) for s in shapes] for n in (1, 2))
    apart = [DISTPlusFeatureLoss()(s, t) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(DISTPlusFeatureLoss()(students, teachers), sum(apart))


@pytest.mark.parametrize("spatial", ["samples", "positions"])
def test_a_scaled_and_shifted_teacher_gives_zero(spatial):
    student = maps(3, 5, 2, 2)
    loss = DISTPlusFeatureLoss(spatial=spatial)(student, 2.5 * student + 3)
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_the_default_rewards_correlated_channels_and_torchdistills_form_the_reverse():
    student, teacher = maps(3, 5, 2, 2, seed=1), maps(3, 5, 2, 2, seed=2)
    nearer = 0.9 * student + 0.1 * teacher
    of = {form: DISTPlusFeatureLoss(kappa=0.0, form=form) for form in ("one_minus", "torchdistill")}
    assert of["one_minus"](nearer, teacher) < of["one_minus"](student, teacher)
    assert of["torchdistill"](nearer, teacher) > of["torchdistill"](student, teacher)


class TestDISTPlusFeatureLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return DISTPlusFeatureLoss()

    def tensors(self, batch):
        return {
            "student_features": torch.randn(batch, 5, 3, 3),
            "teacher_features": torch.randn(batch, 5, 3, 3),
        }


class TestDISTPlusOverPositions(TestDISTPlusFeatureLoss):
    def make(self):
        return DISTPlusFeatureLoss(form="torchdistill", spatial="positions")


def test_positions_where_the_student_is_silent_get_no_gradient():
    student, teacher = maps(3, 5, 2, 2, seed=1), maps(3, 5, 2, 2, seed=2)
    student[:, :, 0, 0] = 0  # as behind a ReLU
    student.requires_grad_()
    DISTPlusFeatureLoss()(student, teacher).backward()
    assert student.grad[:, :, 0, 0].eq(0).all()
    assert student.grad[:, :, 1, 1].ne(0).all()
    assert student.grad.abs().max() < 1


def test_bfloat16_is_within_one_percent():
    student, teacher = (maps(4, 6, 3, 3, seed=n, dtype=torch.float32) for n in (1, 2))
    loss = DISTPlusFeatureLoss()(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(DISTPlusFeatureLoss()(student, teacher).item(), rel=0.01)


def test_other_channels_are_refused_with_what_to_do():
    message = r"student \(2, 3, 4, 4\) and teacher \(2, 5, 4, 4\).*1x1 Conv2d.*adapter: auto"
    with pytest.raises(ValueError, match=message):
        DISTPlusFeatureLoss()(maps(2, 3, 4, 4), maps(2, 5, 4, 4))


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (2, 3, 2, 2)), ((2, 3), (2, 3))])
def test_maps_of_other_sizes_are_refused_with_their_shapes(shapes):
    with pytest.raises(ValueError, match=r"student .* and teacher "):
        DISTPlusFeatureLoss()(*(maps(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"iota": -1.0}, r"iota must be a finite number >= 0, got -1\.0"),
        ({"kappa": math.inf}, "kappa must be a finite number >= 0, got inf"),
        ({"form": "minus"}, "form must be one of 'one_minus', 'torchdistill', got 'minus'"),
        ({"spatial": "batch"}, "spatial must be one of 'samples', 'positions', got 'batch'"),
        ({"eps": 0.0}, r"eps must be a finite number > 0, got 0\.0"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=f"DISTPlusFeatureLoss: {message}"):
        DISTPlusFeatureLoss(**params)
