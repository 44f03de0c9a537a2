"""NSTLoss: the formula written out, properties of a discrepancy, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.neuron_selectivity import NSTLoss

KERNELS = ["polynomial", "linear", "gaussian"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit_rows(sample):
    """Return the channels of one sample as lists, each divided by its norm."""
    rows = [channel.flatten().tolist() for channel in sample]
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def kernel_by_hand(name, rows, degree, offset):
    if name == "linear":
        return dot
    if name == "polynomial":
        return lambda a, b: (dot(a, b) + offset) ** degree
    spread = sum(distance(a, b) for a in rows for b in rows) / len(rows) ** 2
    return lambda a, b: math.exp(-distance(a, b) / (2 * spread))


def by_hand(student, teacher, name, degree=2, offset=0.0):
    """Return the mean over samples of the three means over pairs of channels."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        ours, theirs = unit_rows(s), unit_rows(t)
        k = kernel_by_hand(name, ours + theirs, degree, offset)

        def mean(left, right, k=k):
            return sum(k(a, b) for a in left for b in right) / (len(left) * len(right))

        values.append(mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs))
    return sum(values) / len(values)


class TestNSTLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return NSTLoss()

    def tensors(self, batch):
        shape = (batch, 3, 2, 4)
        return {"student_features": torch.randn(shape), "teacher_features": torch.randn(shape)}


class TestNSTLossWithLinearKernel(TestNSTLoss):
    def make(self):
        return NSTLoss("linear")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("degree", "offset"), [(1, 0.5), (2, 0.0), (2, 0.5), (3, 0.5)])
def test_equals_the_formula_written_out(kernel, degree, offset):
    # Of the first there are more channels than positions, of the second fewer.
    students = [draw(2, 3, 2, 3, seed=1), draw(2, 4, 3, 5, seed=2)]
    teachers = [draw(2, 5, 2, 3, seed=3), draw(2, 2, 3, 5, seed=4)]
    loss = NSTLoss(kernel, degree, offset)(students, teachers)
    pairs = zip(students, teachers, strict=True)
    expected = sum(by_hand(*pair, kernel, degree, offset) for pair in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [(2, 3), (5, 4)])
def test_value_and_gradient_equal_the_published_form(size):
    """The published code takes the mean of each kernel matrix and detaches the teacher's own."""
    student, teacher = draw(3, 4, *size, seed=1).requires_grad_(), draw(3, 6, *size, seed=2)
    s, t = (F.normalize(feature.flatten(2), dim=2) for feature in (student, teacher))

    def mean_kernel(a, b):
        return torch.einsum("bip,bjp->bij", a, b).square().mean()

    expected = mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)
    loss = NSTLoss()(student, teacher)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    (wanted,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, wanted)


def test_gaussian_gradient_takes_the_spread_as_a_constant():
    student, teacher = draw(2, 3, 2, 2, seed=1).requires_grad_(), draw(2, 3, 2, 2, seed=2)
    s, t = (F.normalize(feature.flatten(2), dim=2) for feature in (student, teacher))
    union = torch.cat([s, t], dim=1).detach()
    spread = torch.cdist(union, union).square().mean((1, 2)).view(-1, 1, 1)

    def mean_kernel(a, b):
        squares = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(3)
        return torch.exp(-squares / (2 * spread)).mean()

    expected = mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)
    (wanted,) = torch.autograd.grad(expected, student)
    (gradient,) = torch.autograd.grad(NSTLoss("gaussian")(student, teacher), student)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_identical_features_give_zero_and_no_gradient(kernel):
    student = draw(2, 5, 3, 3).requires_grad_()
    loss = NSTLoss(kernel)(student, student.detach().clone())
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_order_number_and_scale_of_channels_do_not_matter(kernel):
    student, teacher = draw(2, 3, 2, 3, seed=1), draw(2, 4, 2, 3, seed=2)
    same = torch.cat([student.flip(1), 5 * student], dim=1)
    loss = NSTLoss(kernel)
    if kernel == "gaussian":  # its spread depends on how many channels each side has
        same = 5 * student.flip(1)
    torch.testing.assert_close(loss(same, teacher), loss(student, teacher))


@pytest.mark.parametrize(("ours", "theirs"), [(8, 4), (4, 8)])
def test_the_larger_map_is_pooled_first(ours, theirs):
    student, teacher = draw(2, 3, ours, ours, seed=1), draw(2, 3, theirs, theirs, seed=2)
    small_student, small_teacher = (
        F.avg_pool2d(feature, feature.shape[-1] // 4) for feature in (student, teacher)
    )
    torch.testing.assert_close(NSTLoss()(student, teacher), NSTLoss()(small_student, small_teacher))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_dead_channel_gets_no_gradient_and_spoils_no_other(kernel):
    student, teacher = draw(2, 3, 2, 3, seed=1), draw(2, 3, 2, 3, seed=2)
    student[:, 1] = 0.0
    teacher[:, 2] = 0.0
    student.requires_grad_()
    NSTLoss(kernel)(student, teacher).backward()
    assert not student.grad[:, 1].any()
    assert 0 < student.grad.abs().max() < 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_single_identical_channels_give_zero_and_a_finite_gradient(kernel):
    student = torch.ones(2, 1, 2, 2, requires_grad=True)
    loss = NSTLoss(kernel)(student, torch.ones(2, 1, 2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_is_within_a_percent(kernel):
    student, teacher = draw(4, 8, 4, 4, seed=1).relu(), draw(4, 8, 4, 4, seed=2).exp()
    rounded = NSTLoss(kernel)(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(NSTLoss(kernel)(student, teacher).item(), rel=0.01)


def test_under_autocast_the_loss_keeps_its_value():
    student, teacher = draw(2, 4, 3, 3, dtype=torch.float32), torch.rand(2, 4, 3, 3)
    expected = NSTLoss()(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(NSTLoss()(student, teacher), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kernel": "rbf"}, r"NSTLoss: kernel must be one of 'polynomial', .* got 'rbf'"),
        ({"degree": 0}, r"NSTLoss: degree must be a whole number >= 1, got 0"),
        ({"offset": -1.0}, r"NSTLoss: offset must be a finite number >= 0, got -1\.0"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        NSTLoss(**params)


def test_features_that_are_no_maps_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 3\) must be maps"):
        NSTLoss()(torch.zeros(2, 3), torch.zeros(2, 3))


def test_printing_shows_every_parameter():
    assert repr(NSTLoss()) == "NSTLoss(kernel='polynomial', degree=2, offset=0.0)"
