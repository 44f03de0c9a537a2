"""What DKD, WSLD, NKD, USKD, the virtual teacher and L2 share: layouts, labels, precision."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from distill_kd.dkd import DKDLoss
from distill_kd.l2 import LogitL2Loss
from distill_kd.nkd import NKDLoss
from distill_kd.tf_kd import VirtualTeacherLoss
from distill_kd.uskd import USKDLoss
from distill_kd.wsld import WSLDLoss

LOSSES = {
    "dkd": DKDLoss(2.5, 0.7, 1.3),
    "dkd-standardized": DKDLoss(2.5, 0.7, 1.3, standardize=True),
    "wsld": WSLDLoss(2.5, 1.3),
    "wsld-standardized-kl": WSLDLoss(2.5, 1.3, "kl", standardize=True),
    "nkd": NKDLoss(2.5, 1.3),
    "nkd-standardized": NKDLoss(2.5, 1.3, standardize=True),
    "uskd": USKDLoss(0.7, 0.6, 0.5),
    "uskd-paper": USKDLoss(0.7, 0.6, 0.5, rank="paper"),
    "virtual": VirtualTeacherLoss(2.5, 0.4, 1.3, reduction="positionmean"),
    "l2": LogitL2Loss("positionmean"),
    "l2-standardized": LogitL2Loss("mean", standardize=True),
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
taught = pytest.mark.parametrize(
    "loss",
    [loss for loss in LOSSES.values() if "teacher" in inspect.signature(loss.forward).parameters],
    ids=[name for name in LOSSES if name.partition("-")[0] not in ("uskd", "virtual")],
)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def labels(*shape, classes, seed=9):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def call(loss, student, other, targets, mask=None):
    """Call a loss with the other logits, if it takes any: the teacher's, or weak ones."""
    others = () if isinstance(loss, VirtualTeacherLoss) else (other,)
    return loss(student, *others, targets, mask)


def found(loss, student, other, targets, mask=None):
    """Return the loss and the student's gradient."""
    student = student.detach().requires_grad_()
    value = call(loss, student, other, targets, mask)
    return value, *torch.autograd.grad(value, student)


def close(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@each
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3, 2), 1), ((2, 4, 5), 2)])
def test_dense_logits_and_texts_give_what_their_positions_do(loss, shape, dim, soft):
    student, other = logits(*shape, seed=1), logits(*shape, seed=2)
    targets = labels(*shape[:dim], *shape[dim + 1 :], classes=5)
    if soft:
        targets = logits(*shape, seed=3).softmax(dim)
    rows = [t.movedim(dim, -1).reshape(-1, 5) for t in (student, other)]
    of_rows = targets.movedim(dim, -1).reshape(-1, 5) if soft else targets.flatten()

    value, gradient = found(loss, student, other, targets)

    close((value, gradient.movedim(dim, -1).reshape(-1, 5)), found(loss, *rows, of_rows))


@each
@pytest.mark.parametrize("way", ["ignored", "masked", "both"])
def test_positions_that_do_not_count_are_as_if_they_were_not_there(loss, way):
    student, other = logits(2, 3, 5, seed=1), logits(2, 3, 5, seed=2)
    targets, mask = labels(2, 3, classes=5), torch.ones(2, 3)
    left_out = torch.zeros(2, 3, dtype=torch.bool)
    left_out[0, 1] = left_out[1, 2] = True
    if way != "masked":
        targets[0, 1] = -100
    if way != "ignored":
        mask[1, 2] = 0
    targets[1, 2] = -100 if way == "ignored" else targets[1, 2]
    mask[0, 1] = 0 if way == "masked" else mask[0, 1]
    student[left_out], other[left_out] = 1e4 * student[left_out], 1e4
    kept = ~left_out

    value, gradient = found(loss, student, other, targets, None if way == "ignored" else mask)

    close((value, gradient[kept]), found(loss, student[kept], other[kept], targets[kept]))
    assert gradient[left_out].eq(0).all()


@each
@pytest.mark.parametrize("way", ["ignored", "masked"])
def test_a_batch_of_which_nothing_counts_gives_zero_and_no_nan(loss, way):
    targets = labels(3, classes=4) if way == "masked" else torch.full((3,), -100)
    mask = torch.zeros(3, dtype=torch.bool) if way == "masked" else None
    value, gradient = found(loss, logits(3, 4), logits(3, 4, seed=1), targets, mask)
    assert value == 0
    assert gradient.eq(0).all()


@each
def test_another_ignore_index_is_taken(loss):
    parameters = {n: getattr(loss, n) for n in inspect.signature(type(loss)).parameters}
    other = type(loss)(**{**parameters, "ignore_index": 255})
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    close(
        found(other, student, teacher, torch.tensor([2, 255, 0])),
        found(loss, student, teacher, torch.tensor([2, -100, 0])),
    )


@each
def test_probabilities_of_one_class_equal_its_index(loss):
    student, other, targets = logits(4, 5, seed=1), logits(4, 5, seed=2), torch.tensor([0, 4, 1, 1])
    one_hot = F.one_hot(targets, 5)
    close(found(loss, student, other, one_hot.float()), found(loss, student, other, targets))
    close(found(loss, student, other, one_hot), found(loss, student, other, targets))


@each
def test_labels_of_any_integer_type_are_taken(loss):
    student, other, targets = logits(3, 4), logits(3, 4, seed=1), torch.tensor([3, 0, 2])
    expected = found(loss, student, other, targets)
    for dtype in (torch.uint8, torch.int32):
        close(found(loss, student, other, targets.to(dtype)), expected)


@each
def test_adding_a_constant_to_a_sample_s_logits_changes_nothing_but_plain_l2(loss):
    student, other, targets = logits(3, 5, seed=1), logits(3, 5, seed=2), torch.tensor([0, 4, 2])
    shift = torch.tensor([[7.0], [-3.0], [100.0]])
    moved = call(loss, student + shift, other - shift, targets)
    same = torch.isclose(moved, call(loss, student, other, targets))
    assert same == (loss is not LOSSES["l2"])


@each
def test_many_logits_are_looked_at_part_by_part_to_the_same_result(loss, monkeypatch):
    given = logits(7, 5, seed=1), logits(7, 5, seed=2), labels(7, classes=5)
    whole = found(loss, *given)
    soft = found(loss, *given[:2], logits(7, 5, seed=3).softmax(1))
    monkeypatch.setattr("distill_kd.logits.AT_ONCE", 10)
    close(found(loss, *given), whole)
    close(found(loss, *given[:2], logits(7, 5, seed=3).softmax(1)), soft)


@each
def test_few_classes_few_samples_and_extreme_logits_give_finite_numbers(loss):
    for scale, batch, classes in product((0.0, 1.0, 1e4), (1, 3), (2, 6)):
        student, other, mixed = (
            logits(batch, classes, seed=seed, dtype=torch.float32) for seed in (1, 2, 3)
        )
        student, other = scale * student, scale * other
        for targets in (labels(batch, classes=classes), mixed.softmax(1)):
            for pair in ((student, other), (student, student), (student, -student)):
                value, gradient = found(loss, *pair, targets)
                assert value.isfinite(), (scale, batch, classes)
                assert gradient.isfinite().all(), (scale, batch, classes)


@pytest.mark.parametrize(
    ("name", "low"),
    [(name, low) for name in ("dkd", "wsld", "nkd", "l2") for low in (-1e4, -math.inf)]
    + [(name, -1e4) for name in LOSSES if "standardized" in name],
)
@pytest.mark.parametrize("classes", [2, 4])
def test_a_one_hot_teacher_gives_finite_numbers(name, classes, low):
    loss = LOSSES[name]
    student = logits(3, classes, dtype=torch.float32)
    sure = torch.tensor([1, 0, 0])
    teacher = torch.full((3, classes), low).scatter_(1, sure[:, None], 3.0)
    for targets in (sure, torch.tensor([0, 0, 1])):
        value, gradient = found(loss, student, teacher, targets)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["dkd", "wsld", "nkd"])
def test_a_class_that_the_teacher_excludes_is_one_that_it_finds_unlikely(name):
    loss = LOSSES[name]
    student, targets = logits(3, 5, seed=1), torch.tensor([0, 1, 2])
    teacher = logits(3, 5, seed=2)
    teacher[:, 4] = -1e4
    excluded = teacher.masked_fill(teacher == -1e4, -math.inf)
    close(found(loss, student, excluded, targets), found(loss, student, teacher, targets))


@each
def test_nan_logits_are_not_hidden(loss):
    for place in ((0, 0), (0, 2)):
        student = logits(2, 3)
        student[place] = math.nan
        assert call(loss, student, logits(2, 3, seed=1), torch.tensor([0, 1])).isnan()


@taught
def test_a_teacher_s_nan_is_not_hidden(loss):
    for place in ((0, 0), (0, 2)):
        teacher = logits(2, 3)
        teacher[place] = math.nan
        assert loss(logits(2, 3, seed=1), teacher, torch.tensor([0, 1])).isnan()


@taught
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = logits(2, 3).requires_grad_(), logits(2, 3, seed=1).requires_grad_()
    loss(student, teacher, torch.tensor([0, 1])).backward()
    assert student.grad is not None
    assert teacher.grad is None


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(loss, dtype):
    student, other = (logits(8, 10, seed=n).to(dtype) for n in (1, 2))
    targets = labels(8, classes=10)
    value, gradient = found(loss, student, other, targets)
    exact = call(loss, student.double(), other.double(), targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert gradient.dtype == dtype


@each
def test_under_autocast_the_loss_keeps_its_value(loss):
    student, other = (logits(4, 5, seed=n, dtype=torch.float32) for n in (1, 2))
    expected = call(loss, student, other, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call(loss, student, other, torch.arange(4)), expected)


@taught
def test_a_teacher_of_another_precision_is_taken(loss):
    student, teacher = logits(4, 5, dtype=torch.float32), logits(4, 5, seed=1)
    expected = loss(student.double(), teacher, torch.arange(4))
    torch.testing.assert_close(loss(student, teacher, torch.arange(4)), expected)


@taught
def test_logits_of_different_shapes_are_refused_with_both(loss):
    with pytest.raises(ValueError, match=r"student \(4, 10\) and teacher \(4, 100\)"):
        loss(torch.zeros(4, 10), torch.zeros(4, 100), torch.zeros(4, dtype=torch.int64))


@each
def test_targets_that_do_not_fit_are_refused_with_what_would(loss):
    with pytest.raises(ValueError, match=r"class indices \(4,\).*probabilities \(4, 10\)"):
        call(loss, torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["dkd", "nkd", "uskd", "virtual"])
def test_a_single_class_is_refused(name):
    with pytest.raises(ValueError, match=r"two or more.* got 1"):
        call(LOSSES[name], torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("kind", [DKDLoss, NKDLoss])
def test_soft_labels_are_taken_for_their_likeliest_class_or_refused(kind):
    student, teacher = logits(3, 4), logits(3, 4, seed=1)
    mixed = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.7]])
    close(found(kind(), student, teacher, mixed), found(kind(), student, teacher, mixed.argmax(1)))
    with pytest.raises(ValueError, match=r"needs one label .*\(3, 4\).*soft_targets: argmax"):
        kind(soft_targets="error")(student, teacher, mixed)
    kind(soft_targets="error")(student, teacher, mixed.argmax(1))


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        (DKDLoss, {"temperature": 0.0}, r"temperature must be a finite number > 0, got 0\.0"),
        (DKDLoss, {"alpha": -1.0}, r"alpha must be a finite number >= 0, got -1\.0"),
        (DKDLoss, {"beta": math.inf}, "beta must be a finite number >= 0, got inf"),
        (DKDLoss, {"soft_targets": "mix"}, "soft_targets must be one of 'argmax', 'error'"),
        (WSLDLoss, {"temperature": math.nan}, "temperature .* got nan"),
        (WSLDLoss, {"alpha": -0.5}, r"alpha .* got -0\.5"),
        (WSLDLoss, {"soft_term": "js"}, "soft_term must be one of 'cross_entropy', 'kl'"),
        (NKDLoss, {"temperature": -1.0}, r"temperature .* got -1\.0"),
        (NKDLoss, {"gamma": math.nan}, "gamma must be a finite number >= 0, got nan"),
        (USKDLoss, {"mu": -1.0}, r"mu must be a finite number >= 0, got -1\.0"),
        (USKDLoss, {"rank": "zipf"}, "rank must be one of 'paper', 'code', got 'zipf'"),
        (USKDLoss, {"gather": "some"}, "gather must be one of 'none', 'all', got 'some'"),
        (VirtualTeacherLoss, {"temperature": 0.0}, "temperature must be"),
        (VirtualTeacherLoss, {"alpha": 1.5}, "alpha must be <= 1 unless beta is given"),
        (VirtualTeacherLoss, {"beta": -1.0}, r"beta must be .* or None .* got -1\.0"),
        (VirtualTeacherLoss, {"correct_probability": 1.1}, r"correct_probability .*\[0, 1\]"),
        (VirtualTeacherLoss, {"reduction": "sum"}, "reduction must be one of 'batchmean', "),
        (LogitL2Loss, {"reduction": "sum"}, "reduction must be one of 'batchmean', "),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(kind, params, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**params)


@each
def test_printing_shows_every_parameter(loss):
    shown = repr(loss)
    for name in inspect.signature(type(loss)).parameters:
        assert f"{name}={getattr(loss, name)!r}" in shown


@pytest.mark.parametrize("module", ["dkd", "l2", "nkd", "tf_kd", "uskd", "wsld"])
def test_docstring_examples_hold(module):
    results = doctest.testmod(importlib.import_module(f"distill_kd.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
