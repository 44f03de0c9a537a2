"""What every loss on logits holds to: layouts, masks, labels, precision, extremes, memory."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

import distill_kd
from distill_kd import logits as logits_module
from distill_kd.logits import LogitLoss, RowLoss, Rows, standardized

GIVEN = {"CTKDLoss": {"ramp_steps": 4}, "KDLoss": {"reduction": "positionmean"}}
"""What a loss needs, and what makes it a mean over positions where it is not one by itself."""
PARTLY_STANDARDIZED = {"MLKDLoss", "NKDLoss", "WSLDLoss"}
"""Losses of which a part takes logits as they are, whatever ``standardize`` says."""

OFFERED = {
    name: kind
    for name, kind in distill_kd.distill_losses().items()
    if issubclass(kind, LogitLoss)
    and {"student", "teacher", "mask"} <= set(inspect.signature(kind.forward).parameters)
}
each_loss = pytest.mark.parametrize("name", OFFERED)
each_row_loss = pytest.mark.parametrize(
    "name", [name for name, kind in OFFERED.items() if issubclass(kind, RowLoss)]
)


def built(name: str, **params: object) -> LogitLoss:
    return OFFERED[name](**GIVEN.get(name, {}), **params)


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(*shape: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(9))


def result(
    loss: LogitLoss,
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value and gradient."""
    torch.manual_seed(0)
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, targets, mask)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def dense(rows: torch.Tensor) -> torch.Tensor:
    """Return rows (12, ...) as two images of 2 x 3 positions, classes in dimension 1."""
    images = rows.view(2, 2, 3, *rows.shape[1:])
    return images.movedim(-1, 1) if rows.dim() == 2 else images


@each_loss
def test_dense_logits_are_rows_in_another_order(name: str) -> None:
    student, teacher, targets = logits(12, 5), logits(12, 5, seed=1), labels(12, classes=5)
    value, gradient = result(built(name), student, teacher, targets)
    images = result(built(name), dense(student), dense(teacher), dense(targets))
    torch.testing.assert_close(images[0], value)
    torch.testing.assert_close(images[1], dense(gradient))


@each_loss
def test_of_three_dimensions_the_last_is_the_classes_unless_told(name: str) -> None:
    student, teacher, targets = logits(12, 5), logits(12, 5, seed=1), labels(12, classes=5)
    value, gradient = result(built(name), student, teacher, targets)
    texts = result(built(name), student.view(3, 4, 5), teacher.view(3, 4, 5), targets.view(3, 4))
    torch.testing.assert_close(texts[0], value)
    torch.testing.assert_close(texts[1].view(12, 5), gradient)
    first = (x.view(3, 4, 5).movedim(2, 1) for x in (student, teacher))
    told = result(built(name, class_dim=1), *first, targets.view(3, 4))
    torch.testing.assert_close(told[0], value)
    torch.testing.assert_close(told[1].movedim(1, 2).reshape(12, 5), gradient)


@each_loss
def test_positions_that_do_not_count_change_nothing(name: str) -> None:
    student, teacher, targets = logits(12, 5), logits(12, 5, seed=1), labels(12, classes=5)
    kept = torch.arange(12) % 3 != 1
    value, gradient = result(built(name), student[kept], teacher[kept], targets[kept])
    masked = result(built(name), student, teacher, targets, kept)
    torch.testing.assert_close(masked[0], value)
    torch.testing.assert_close(masked[1][kept], gradient)
    assert (masked[1][~kept] == 0).all()


@each_loss
def test_ignored_labels_change_nothing(name: str) -> None:
    student, teacher, targets = logits(12, 5), logits(12, 5, seed=1), labels(12, classes=5)
    kept = torch.arange(12) % 3 != 1
    more = {"ignore_soft": True} if name == "KDLoss" else {}
    value, gradient = result(built(name, **more), student[kept], teacher[kept], targets[kept])
    loss = built(name, ignore_index=255, **more)
    ignoring = result(loss, student, teacher, targets.where(kept, 255))
    torch.testing.assert_close(ignoring[0], value)
    torch.testing.assert_close(ignoring[1][kept], gradient)
    assert (ignoring[1][~kept] == 0).all()


@each_loss
def test_where_nothing_counts_there_is_no_gradient(name: str) -> None:
    value, gradient = result(
        built(name), logits(4, 5), logits(4, 5, seed=1), labels(4, classes=5), torch.zeros(4)
    )
    assert value.isfinite()
    assert (gradient == 0).all()


@each_loss
def test_one_hot_probabilities_are_labels(name: str) -> None:
    student, teacher, targets = logits(6, 5), logits(6, 5, seed=1), labels(6, classes=5)
    hard = result(built(name), student, teacher, targets)
    soft = result(built(name), student, teacher, F.one_hot(targets, 5).double())
    torch.testing.assert_close(soft, hard)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(6, 5).to(dtype), logits(6, 5, seed=1).to(dtype)
    value, gradient = result(built(name), student, teacher, labels(6, classes=5))
    wide = result(built(name), student.float(), teacher.float(), labels(6, classes=5))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wide[0])
    torch.testing.assert_close(gradient, wide[1].to(dtype))


@each_loss
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_give_finite_numbers(name: str, scale: float, batch: int) -> None:
    student, teacher = logits(batch, 5).float(), logits(batch, 5, seed=1).float()
    targets = labels(batch, classes=5)
    one_hot = torch.full((batch, 5), -1e4).scatter_(1, targets[:, None], 1e4)
    pairs = [
        (student * scale, teacher * scale),
        (student, student),
        (student * scale, one_hot),
        (one_hot, one_hot),
    ]
    for one, other in pairs:
        value, gradient = result(built(name), one, other, targets)
        assert value.isfinite()
        assert gradient.isfinite().all()


@each_row_loss
def test_many_logits_are_looked_at_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets = logits(13, 5), logits(13, 5, seed=1), labels(13, classes=5)
    mask = torch.arange(13) % 5 != 2
    whole = result(built(name), student, teacher, targets, mask)
    monkeypatch.setattr(logits_module, "AT_ONCE", 20)
    torch.testing.assert_close(result(built(name), student, teacher, targets, mask), whole)
    monkeypatch.setattr(logits_module, "AT_ONCE", 1)
    torch.testing.assert_close(result(built(name), student, teacher, targets, mask), whole)


@each_loss
def test_what_does_not_fit_is_refused_with_what_would(name: str) -> None:
    student = logits(4, 5)
    with pytest.raises(ValueError, match=rf"{name}: .* student \(4, 5\) and teacher \(4, 6\)"):
        built(name)(student, logits(4, 6), labels(4, classes=5))
    with pytest.raises(ValueError, match=rf"{name}: targets must be class indices \(4,\), or"):
        built(name)(student, student, labels(3, classes=5))
    with pytest.raises(ValueError, match=rf"{name}: mask must be numbers \(4,\); got \(4, 5\)"):
        built(name)(student, student, labels(4, classes=5), torch.ones(4, 5))
    with pytest.raises(ValueError, match=rf"{name}: logits .* in dimension 7 .* got \(4, 5\)"):
        built(name, class_dim=7)(student, student, labels(4, classes=5))


def test_standardized_logits_are_those_of_the_definition() -> None:
    rows = logits(3, 6)
    expected = (rows - rows.mean(1, keepdim=True)) / (1e-7 + rows.std(1, keepdim=True))
    torch.testing.assert_close(standardized(rows), expected)
    assert torch.autograd.gradcheck(standardized, rows.requires_grad_())
    equal = torch.ones(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(standardized(equal).sum(), equal)
    assert (standardized(equal) == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [n for n, kind in OFFERED.items() if "standardize" in inspect.signature(kind).parameters],
)
def test_standardized_logits_do_not_see_scale_or_shift_of_the_teacher(name: str) -> None:
    more = {"alpha": 0.0} if name == "KDLoss" else {}
    student, teacher, targets = logits(6, 5), logits(6, 5, seed=1), labels(6, classes=5)
    loss, plain = built(name, standardize=True, **more), built(name, **more)
    value, gradient = result(loss, student, teacher, targets)
    other = result(loss, student, 3 * teacher + 7, targets)
    if name not in PARTLY_STANDARDIZED:
        torch.testing.assert_close(other, (value, gradient), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(result(plain, student, teacher, targets)[0], value)


def test_several_labels_share_one_in_equal_parts() -> None:
    several = torch.tensor([[1, 0, 1], [0, 0, 1]])
    rows = Rows(torch.zeros(2, 3), torch.zeros(2, 3), soft=several)
    assert rows.probabilities(torch.float64).tolist() == [[0.5, 0, 0.5], [0, 0, 1]]
