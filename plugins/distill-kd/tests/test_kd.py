"""KDLoss: an independent formula, identities, extremes, and what it refuses."""

from __future__ import annotations

import doctest
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

import distill_kd.kd
from distill_kd import DISTLoss, KDLoss


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(*shape, classes, seed=9):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def rows(values):
    """Return the class vectors of logits (B, K, ...), one list a position."""
    return values.movedim(1, -1).flatten(0, -2).tolist()


def divergence_by_hand(student, teacher, temperature, entropy=True):
    pairs = zip(rows(student), rows(teacher), strict=True)
    return sum(
        p * ((math.log(p) if entropy else 0.0) - math.log(q))
        for s, t in pairs
        for p, q in zip(softmax(t, temperature), softmax(s, temperature), strict=True)
    )


def cross_entropies_by_hand(student, targets, smoothing=0.0, ignore_index=-100):
    """Return the cross entropy of each label that counts."""
    return [
        -sum(
            ((1 - smoothing) * (k == label) + smoothing / len(row)) * math.log(q)
            for k, q in enumerate(softmax(row))
        )
        for row, label in zip(rows(student), targets.flatten().tolist(), strict=True)
        if label != ignore_index
    ]


SHAPES = [(1, 2), (3, 7), (2, 3, 2, 5)]


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, None), (0.0, None), (0.25, 2.0), (2.0, 0.5)])
@pytest.mark.parametrize(("shape", "temperature"), list(product(SHAPES, [0.7, 2.5])))
def test_equals_the_formula_written_out(shape, temperature, alpha, beta, reduction):
    student, teacher = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = labels(shape[0], *shape[2:], classes=shape[1])
    ce = cross_entropies_by_hand(student, targets, smoothing=0.2)
    kl = divergence_by_hand(student, teacher, temperature)
    hard = sum(ce) if reduction == "sum" else sum(ce) / len(ce)
    soft = {"batchmean": kl / shape[0], "mean": kl / student.numel(), "sum": kl}[reduction]
    weight = 1 - alpha if beta is None else beta

    loss = KDLoss(temperature, alpha, beta, reduction, label_smoothing=0.2)

    expected = alpha * hard + weight * temperature * temperature * soft
    assert loss(student, teacher, targets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("soft_term", ["kl", "cross_entropy"])
@pytest.mark.parametrize("soft_targets", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 2)])
def test_gradient_equals_finite_differences(shape, soft_targets, soft_term, reduction):
    student, teacher = logits(*shape, seed=3).requires_grad_(), logits(*shape, seed=4)
    targets = labels(shape[0], *shape[2:], classes=shape[1])
    if soft_targets:
        targets = logits(*shape, seed=5).softmax(1)
    loss = KDLoss(2.5, 0.4, 1.3, reduction, label_smoothing=0.1, soft_term=soft_term)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets), student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_identical_logits_give_exactly_zero_and_no_gradient(temperature):
    student = logits(5, 6, dtype=torch.float32).requires_grad_()
    loss = KDLoss(temperature, alpha=0.0)(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() < 1e-6


def test_adding_a_constant_to_a_samples_logits_changes_nothing():
    student, teacher, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), torch.tensor([0, 4, 2])
    shift = torch.tensor([[7.0], [-3.0], [100.0]])
    moved = KDLoss()(student + shift, teacher - shift, targets)
    torch.testing.assert_close(moved, KDLoss()(student, teacher, targets))


def test_high_temperature_gives_the_squared_distance_of_centred_logits():
    student, teacher = logits(4, 6, seed=1), logits(4, 6, seed=2)
    gap = (student - teacher) - (student - teacher).mean(1, keepdim=True)
    loss = KDLoss(temperature=1e4, alpha=0.0)(student, teacher)
    assert loss.item() == pytest.approx((gap.square().sum() / (2 * 6 * 4)).item(), rel=1e-3)


def test_alpha_one_is_the_cross_entropy_alone():
    student, targets = logits(4, 3), torch.tensor([0, 2, 1, 1])
    loss = KDLoss(alpha=1.0)(student, logits(4, 3, seed=1), targets)
    torch.testing.assert_close(loss, F.cross_entropy(student, targets))


def test_alpha_zero_keeps_beta_and_the_squared_temperature():
    student, teacher = logits(4, 3, seed=1), logits(4, 3, seed=2)
    loss = KDLoss(3.0, alpha=0.0, beta=0.7)(student, teacher, torch.zeros(4, dtype=torch.int64))
    expected = 0.7 * 9.0 * divergence_by_hand(student, teacher, 3.0) / 4
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(("beta", "weight"), [(None, 0.8), (0.5, 0.5)])
def test_without_targets_the_soft_term_alone_keeps_its_weight(beta, weight):
    student, teacher = logits(4, 3, seed=1), logits(4, 3, seed=2)
    loss = KDLoss(3.0, alpha=0.2, beta=beta)(student, teacher)
    expected = weight * 9.0 * divergence_by_hand(student, teacher, 3.0) / 4
    assert loss.item() == pytest.approx(expected)


def test_alpha_zero_does_not_look_at_targets():
    loss = KDLoss(alpha=0.0)(logits(4, 3), logits(4, 3, seed=1), torch.full((4,), 99))
    torch.testing.assert_close(loss, KDLoss(alpha=0.0)(logits(4, 3), logits(4, 3, seed=1)))


def test_soft_cross_entropy_exceeds_the_divergence_by_the_teachers_entropy():
    student, teacher = logits(4, 3, seed=1).requires_grad_(), logits(4, 3, seed=2)
    results = []
    for soft_term in ("kl", "cross_entropy"):
        loss = KDLoss(3.0, alpha=0.0, beta=0.6, soft_term=soft_term)(student, teacher)
        results.append((loss.item(), *torch.autograd.grad(loss, student)))
    (kl, kl_gradient), (ce, ce_gradient) = results
    entropy = -sum(p * math.log(p) for t in rows(teacher) for p in softmax(t, 3.0)) / 4
    assert ce - kl == pytest.approx(0.6 * 9.0 * entropy)
    torch.testing.assert_close(ce_gradient, kl_gradient)


def test_probabilities_of_one_class_equal_its_index():
    student, teacher, targets = logits(4, 3), logits(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(
        KDLoss(label_smoothing=0.1)(student, teacher, F.one_hot(targets, 3).double()),
        KDLoss(label_smoothing=0.1)(student, teacher, targets),
    )


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2, 4)])
def test_mixed_targets_give_the_mixed_cross_entropy(shape, reduction):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    first, second = (labels(shape[0], *shape[2:], classes=3, seed=seed) for seed in (5, 6))
    one_hot = [F.one_hot(targets, 3).movedim(-1, 1).float() for targets in (first, second)]
    loss = KDLoss(reduction=reduction)
    mixed = loss(student, teacher, 0.3 * one_hot[0] + 0.7 * one_hot[1])
    apart = 0.3 * loss(student, teacher, first) + 0.7 * loss(student, teacher, second)
    torch.testing.assert_close(mixed, apart)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_ignored_labels_leave_the_cross_entropy_and_stay_in_the_soft_term(reduction):
    student, teacher = logits(2, 3, 2, 2, seed=1), logits(2, 3, 2, 2, seed=2)
    targets = labels(2, 2, 2, classes=3)
    targets[0, 0, 0] = targets[1, 1, 1] = 255
    ce = cross_entropies_by_hand(student, targets, smoothing=0.1, ignore_index=255)
    loss = KDLoss(reduction=reduction, label_smoothing=0.1, ignore_index=255)
    soft = loss(student, teacher)
    hard = loss(student, teacher, targets) - soft
    assert len(ce) == 6
    assert hard.item() == pytest.approx(0.5 * (sum(ce) / (1 if reduction == "sum" else 6)))
    changed = teacher.clone()
    changed[0, 0, 0, 0] += 1
    assert loss(student, changed).item() != pytest.approx(soft.item())


def test_a_batch_of_ignored_labels_gives_the_soft_term_and_no_nan():
    student, teacher = logits(2, 3).requires_grad_(), logits(2, 3, seed=1)
    loss = KDLoss()(student, teacher, torch.full((2,), -100))
    loss.backward()
    torch.testing.assert_close(loss, KDLoss()(student, teacher))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_taken(dtype):
    student, teacher, targets = logits(3, 4), logits(3, 4, seed=1), torch.tensor([3, 0, 2])
    torch.testing.assert_close(
        KDLoss()(student, teacher, targets.to(dtype)), KDLoss()(student, teacher, targets)
    )


@pytest.mark.parametrize("soft_term", ["kl", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_huge_logits_stay_finite(temperature, reduction, soft_term):
    student = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, 1e4], [-1e4, 1e4, 0.0]])
    loss = KDLoss(temperature, reduction=reduction, soft_term=soft_term)(
        student, teacher, torch.tensor([2, 1])
    )
    loss.backward()
    # The first sample is wrong by 2e4 in both terms, the second right in both.
    hard, soft = 2e4, temperature * 2e4
    divisor = {"batchmean": (2, 2), "mean": (2, 6), "sum": (1, 1)}[reduction]
    assert loss.item() == pytest.approx(0.5 * hard / divisor[0] + 0.5 * soft / divisor[1])
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("low", [-1e4, -math.inf])
@pytest.mark.parametrize("soft_term", ["kl", "cross_entropy"])
def test_a_one_hot_teacher_gives_the_cross_entropy_with_its_class(soft_term, low):
    student = logits(3, 4).requires_grad_()
    classes = torch.tensor([2, 0, 3])
    teacher = torch.full((3, 4), low, dtype=torch.float64)
    teacher[torch.arange(3), classes] = 0.0
    loss = KDLoss(temperature=1.0, alpha=0.0, soft_term=soft_term)(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(student, classes))
    assert student.grad.isfinite().all()


def test_a_class_excluded_on_both_sides_counts_nothing():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    student[:, 4], teacher[:, 4] = -1e4, -math.inf
    student.requires_grad_()
    targets = torch.tensor([0, 3, 2])
    loss = KDLoss()(student, teacher, targets)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, KDLoss()(student[:, :4], teacher[:, :4], targets))
    assert gradient.isfinite().all()
    assert gradient[:, 4].eq(0).all()


def test_nan_logits_are_not_hidden():
    student = logits(2, 3)
    student[0, 0] = math.nan
    assert KDLoss()(student, logits(2, 3, seed=1)).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student = logits(8, 10, seed=1).to(dtype).requires_grad_()
    teacher, targets = logits(8, 10, seed=2).to(dtype), labels(8, classes=10)
    loss = KDLoss()(student, teacher, targets)
    loss.backward()
    exact = KDLoss()(student.detach().double(), teacher.double(), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.dtype == dtype


def test_under_autocast_the_loss_keeps_its_value():
    student, teacher = logits(4, 5, dtype=torch.float32), logits(4, 5, seed=1, dtype=torch.float32)
    expected = KDLoss()(student, teacher, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(KDLoss()(student, teacher, torch.arange(4)), expected)


def test_teacher_of_another_precision_is_taken():
    student, teacher = logits(4, 5, dtype=torch.float32), logits(4, 5, seed=1)
    expected = KDLoss()(student.double(), teacher, torch.arange(4))
    torch.testing.assert_close(KDLoss()(student, teacher, torch.arange(4)), expected)


def test_teacher_gets_no_gradient():
    student, teacher = logits(2, 3).requires_grad_(), logits(2, 3, seed=1).requires_grad_()
    KDLoss()(student, teacher, torch.tensor([0, 1])).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be a finite number > 0, got 0\.0"),
        ({"temperature": -1.0}, r"temperature .* got -1\.0"),
        ({"temperature": math.nan}, r"temperature .* got nan"),
        ({"temperature": math.inf}, r"temperature .* got inf"),
        ({"alpha": -0.1}, r"alpha must be a finite number >= 0, got -0\.1"),
        ({"alpha": 1.5}, r"alpha must be <= 1 unless beta is given .* got 1\.5"),
        ({"beta": -0.5}, r"beta must be a finite number >= 0, or None .* got -0\.5"),
        ({"beta": math.nan}, r"beta .* got nan"),
        ({"beta": math.inf}, r"beta .* got inf"),
        ({"alpha": math.inf, "beta": 1.0}, r"alpha must be a finite .* got inf"),
        (
            {"reduction": "none"},
            r"reduction must be one of 'batchmean', 'positionmean', .* got 'none'",
        ),
        ({"label_smoothing": 1.1}, r"label_smoothing must be within \[0, 1\], got 1\.1"),
        ({"label_smoothing": -0.1}, r"label_smoothing .* got -0\.1"),
        ({"soft_term": "js"}, r"soft_term must be one of 'kl', 'cross_entropy', got 'js'"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=message):
        KDLoss(**params)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 10), (4, 100), r"student \(4, 10\) and teacher \(4, 100\)"),
        ((4, 10), (1, 10), r"student \(4, 10\) and teacher \(1, 10\)"),
        ((10,), (10,), r"\(B, K\).* got \(10,\)"),
        ((0, 10), (0, 10), r"no empty dimension, got \(0, 10\)"),
    ],
)
def test_logits_that_do_not_fit_are_refused_with_their_shapes(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        KDLoss()(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize(
    "targets",
    [
        torch.zeros(4, 1, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(4),
        torch.zeros(4, 10, 1),
        torch.zeros(4, 9),
    ],
)
def test_targets_that_do_not_fit_are_refused_with_what_would(targets):
    got = re.escape(f"got {tuple(targets.shape)} of {targets.dtype}")
    message = rf"class indices \(4,\).*probabilities \(4, 10\).*{got}"
    with pytest.raises(ValueError, match=message):
        KDLoss()(torch.zeros(4, 10), torch.zeros(4, 10), targets)


def test_printing_shows_every_parameter():
    shown = repr(KDLoss(2.0, 0.3, reduction="mean", label_smoothing=0.1, ignore_index=255))
    assert shown == (
        "KDLoss(temperature=2.0, alpha=0.3, beta=0.7, reduction='mean', label_smoothing=0.1, "
        "ignore_index=255, soft_term='kl', ignore_soft=False, standardize=False, "
        "activation='softmax', class_dim=None)"
    )


def test_docstring_examples_hold():
    results = doctest.testmod(distill_kd.kd)
    assert results.attempted > 0
    assert results.failed == 0


def test_readme_examples_hold(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("\n", 1) for part in readme.split("```")[1::2]]
    terms = [yaml.safe_load(text)["criterion"] for language, text in blocks if language == "yaml"]
    kd, dist = terms[0]["kd"], terms[1]["dist"]
    assert (kd["type"], dist["type"]) == ("KDLoss", "DISTLoss")
    assert isinstance(KDLoss(**kd["params"]), KDLoss)
    assert isinstance(DISTLoss(**dist["params"]), DISTLoss)
    exec(dict(blocks)["python"], {})


def test_with_sigmoid_each_class_is_a_question_of_its_own():
    student, teacher = logits(3, 4), logits(3, 4, seed=1)
    targets = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    soft = hard = 0.0
    for s, t, y in zip(*(x.flatten().tolist() for x in (student, teacher, targets)), strict=True):
        p, q, own = (1 / (1 + math.exp(-z)) for z in (t / 2, s / 2, s))
        soft += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        hard -= math.log(own if y else 1 - own)
    value = KDLoss(2.0, alpha=0.3, activation="sigmoid")(student, teacher, targets)
    assert value.item() == pytest.approx(0.3 * hard / 12 + 0.7 * 4 * soft / 3)


def test_with_sigmoid_class_indices_are_refused():
    with pytest.raises(ValueError, match=r"targets of 0 and 1 for each class, .* \(3, 4\), got"):
        KDLoss(activation="sigmoid")(logits(3, 4), logits(3, 4), torch.zeros(3).long())


def test_ignored_labels_still_have_a_soft_term_unless_told():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    targets = torch.tensor([0, -100, 2, 1])
    soft = KDLoss(alpha=0.0)(student, teacher).item()
    ce = F.cross_entropy(student, targets).item()
    value = KDLoss(alpha=1.0, beta=1.0)(student, teacher, targets).item()
    assert value == pytest.approx(ce + soft)
    kept = targets >= 0
    alone = KDLoss(alpha=1.0, beta=1.0, reduction="positionmean")(
        student[kept], teacher[kept], targets[kept]
    )
    told = KDLoss(alpha=1.0, beta=1.0, reduction="positionmean", ignore_soft=True)
    assert told(student, teacher, targets).item() == pytest.approx(alone.item())


def test_standardized_logits_leave_the_cross_entropy_as_it_is():
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    targets = labels(4, classes=3)
    value = KDLoss(1.0, alpha=1.0, beta=0.0, standardize=True)(student, teacher, targets)
    assert value.item() == pytest.approx(F.cross_entropy(student, targets).item())


def test_equals_what_the_authors_of_logit_standardisation_give_on_closed_form_logits():
    b, k = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    student, teacher = 2 * torch.sin(0.7 * b + 1.3 * k), 2 * torch.cos(0.5 * b + 0.9 * k)
    value = KDLoss(2.0, alpha=0.0, standardize=True)(student.double(), teacher.double())
    assert value.item() == pytest.approx(0.128696, abs=1e-6)


def test_with_sigmoid_a_class_that_the_teacher_excludes_is_answered_no():
    teacher = torch.tensor([[1.0, -torch.inf]])
    student = torch.zeros(1, 2, requires_grad=True)
    loss = KDLoss(1.0, alpha=0.0, activation="sigmoid")(student, teacher)
    low = KDLoss(1.0, alpha=0.0, activation="sigmoid")(student, teacher.clamp_min(-200))
    assert loss.item() == pytest.approx(low.item())
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
