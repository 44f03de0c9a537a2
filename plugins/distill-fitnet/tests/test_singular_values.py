"""KDSVDLoss: the formula written out, gradients where they are hard, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from distill.testing import LossConformance
from distill_fitnet import singular_values, singular_vectors
from distill_fitnet.singular_values import KDSVDLoss
from distill_fitnet.singular_vectors import MainVector, right_singular_vectors


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layers(*shapes, seed=0, dtype=torch.float64):
    return [draw(*shape, seed=seed + number, dtype=dtype) for number, shape in enumerate(shapes)]


def main_vectors(sample, count):
    """Return the singular vectors over channels of one map, as rows, and the singular values."""
    channels = sample.shape[0]
    _, values, rows = np.linalg.svd(sample.detach().numpy().reshape(channels, -1).T)
    return rows[:count], values[:count]


def aligned_by_hand(student, teacher, k, spare):
    theirs, values = main_vectors(teacher, k)
    theirs = [math.copysign(1, sum(vector)) * vector for vector in theirs]
    ours, _ = main_vectors(student, k + spare)
    weights = values / math.sqrt(sum(value**2 for value in values))
    matched = []
    for vector in theirs:
        cosines = [float(candidate @ vector) for candidate in ours]
        best = max(range(len(cosines)), key=lambda number: abs(cosines[number]))
        matched.append(math.copysign(1, cosines[best]) * ours[best])
    return [w * v for w, v in zip(weights, matched, strict=True)], [
        w * v for w, v in zip(weights, theirs, strict=True)
    ]


def by_hand(students, teachers, k=1, spare=3, width=8.0):
    total = 0.0
    batch = len(students[0])
    for b in range(batch):
        pairs = zip(students, teachers, strict=True)
        vectors = [aligned_by_hand(s[b], t[b], k, spare) for s, t in pairs]
        for (ours_low, theirs_low), (ours, theirs) in pairwise(vectors):
            for j in range(k):
                for a in range(len(ours[j])):
                    for c in range(len(ours_low[j])):
                        r_student = math.exp(-((ours[j][a] - ours_low[j][c]) ** 2) / width)
                        r_teacher = math.exp(-((theirs[j][a] - theirs_low[j][c]) ** 2) / width)
                        total += (r_student - r_teacher) ** 2
    return total / batch


class TestKDSVDLoss(LossConformance):
    """The second layer is the first one's transposed, since a test gives one tensor a side."""

    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return OfOneTensor()

    def tensors(self, batch):
        # Maps with one main direction, as behind a ReLU; noise alone has none to be stable.
        shape = (batch, 4, 4, 3)
        return {
            "student_features": torch.randn(shape).abs() + 1,
            "teacher_features": torch.randn(shape).abs() + torch.arange(4.0).view(4, 1, 1),
        }


class OfOneTensor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = KDSVDLoss()

    def forward(self, student_features, teacher_features):
        student, teacher = (
            [features, features.transpose(1, 2)]
            for features in (student_features, teacher_features)
        )
        return self.loss(student, teacher)


SHAPES = [(2, 4, 3, 3), (2, 6, 2, 2), (2, 3, 2, 4)]


@pytest.mark.parametrize(
    ("k", "spare", "width"),
    [(1, 3, 8.0), (1, 0, 2.0), (1, 3, 0.05), (2, 3, 8.0), (3, 1, 5), (2, 3, 0.3)],
)
def test_equals_the_formula_written_out(k, spare, width):
    students, teachers = layers(*SHAPES, seed=1), layers(*SHAPES, seed=11)
    loss = KDSVDLoss(k, spare, width)(students, teachers)
    expected = by_hand(students, teachers, k, spare, width)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_heights_and_widths_may_differ():
    students = layers((2, 4, 4, 4), (2, 6, 2, 2), seed=1)
    teachers = layers((2, 4, 3, 5), (2, 6, 3, 2), seed=11)
    loss = KDSVDLoss()(students, teachers)
    assert loss.item() == pytest.approx(by_hand(students, teachers), rel=1e-10)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 9, 2, 2), (2, 4, 2, 2)])
@pytest.mark.parametrize("count", [1, 3])
def test_gradient_of_the_vectors_is_that_of_torchs_decomposition(shape, count):
    features = draw(*shape, seed=1).requires_grad_()
    vectors, values = right_singular_vectors(features, count)
    *_, rows = torch.linalg.svd(features.flatten(2).mT, full_matrices=False)
    # A function that forgets the sign, which is not determined.
    weight = draw(*vectors.shape, seed=3)
    (gradient,) = torch.autograd.grad((weight * vectors.square()).sum(), features)
    (wanted,) = torch.autograd.grad((weight * rows.mT[:, :, :count].square()).sum(), features)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)
    assert values.shape == (2, count)


def as_behind_a_relu(*shape, seed=0, dtype=torch.float64):
    """Return maps of one sign, in which the first singular vector stands out."""
    return draw(*shape, seed=seed, dtype=dtype).abs() + 0.5


def refuse(*_):
    pytest.fail("a map was decomposed whose first vector stands out")


@pytest.mark.parametrize("shape", [(3, 4, 8, 9), (3, 64, 9, 9), (3, 96, 4, 4), (3, 5, 2, 2)])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_a_vector_that_stands_out_and_its_gradient_are_those_of_torchs_decomposition(
    shape, dtype, near, monkeypatch
):
    features = as_behind_a_relu(*shape, seed=1, dtype=dtype).requires_grad_()
    exact = features.detach().double().requires_grad_()
    *_, rows = torch.linalg.svd(exact.flatten(2).mT, full_matrices=False)
    wanted = rows[:, :1].mT
    wanted = wanted * wanted.sum(1, keepdim=True).sign()
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    vectors = singular_values._turned(singular_vectors.main_vectors(features))
    torch.testing.assert_close(vectors.double(), wanted, rtol=0, atol=near)
    weight = draw(*vectors.shape, seed=3)
    (gradient,) = torch.autograd.grad((weight.to(dtype) * vectors).sum(), features)
    (slope,) = torch.autograd.grad((weight * wanted).sum(), exact)
    size = slope.abs().max().item()
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=10 * near * size)


def spectrum(*values, dtype=torch.float64, turn=True):
    """Return a map (1, C, 4, 4) with given singular values."""
    count = len(values)
    left, right = (torch.linalg.qr(draw(size, size, seed=size))[0] for size in (16, count))
    if not turn:
        left, right = torch.eye(16, dtype=left.dtype), torch.eye(count, dtype=left.dtype)
    matrix = left[:, :count] * torch.tensor(values, dtype=left.dtype) @ right.mT
    return matrix.mT.reshape(1, count, 4, 4).to(dtype)


@pytest.mark.parametrize("turn", [True, False], ids=["turned", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "clear"),
    [
        ((1.0, 0.1, 0.01), True),
        ((1.0, 0.0, 0.0), True),  # of rank 1
        ((1.0, 0.1, 0.1), True),
        ((1e6, 1.0, 1e-6), True),
        ((1e-6, 1e-8, 1e-10), True),
        ((1.0, 1.0, 0.1), False),
        ((1.0, 0.999999, 0.1), False),
        ((1.0, 0.97, 0.1), False),
        ((0.1, 0.1, 0.1), False),
        ((0.0, 0.0, 0.0), False),
    ],
)
def test_only_a_vector_that_stands_out_is_taken_without_a_decomposition(values, clear, dtype, turn):
    features = spectrum(*values, dtype=dtype, turn=turn)
    found = MainVector.of(features)
    assert found.clear.tolist() == [clear]
    if clear:
        *_, rows = torch.linalg.svd(features.flatten(2).mT.double())
        cosine = (rows[:, :1] @ found.on_channels().double()).abs().item()
        assert cosine == pytest.approx(1.0, abs=1e-6 if dtype == torch.float32 else 1e-14)


def hard_maps(channels, seed):
    """Return maps (6, C, 4, 4): two that are easy, and between them four that are not."""
    easy = as_behind_a_relu(2, channels, 4, 4, seed=seed)
    equal = spectrum(*[1.0] * 2, *[0.5] * (channels - 2))
    plain = draw(1, channels, 4, 4, seed=seed + 1)
    flat = plain.clone()
    flat[:, 2:] = 0
    return torch.cat((easy[:1], equal, plain, flat, -plain, easy[1:]))


def test_samples_of_one_batch_may_be_easy_and_hard():
    students = [hard_maps(channels, seed=1)[[0, 2, 3, 4, 5]] for channels in (5, 4)]
    teachers = [hard_maps(channels, seed=21)[[0, 2, 3, 4, 5]] for channels in (5, 4)]
    clear = MainVector.of(students[0]).clear
    assert clear.any()
    assert not clear.all()
    loss = KDSVDLoss()(students, teachers)
    assert loss.item() == pytest.approx(by_hand(students, teachers), rel=1e-10)
    inputs = [student.requires_grad_() for student in students]
    assert torch.autograd.gradcheck(lambda *given: KDSVDLoss()(given, teachers), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_samples_leave_the_gradient_of_the_others_alone(dtype):
    students = [hard_maps(channels, seed=1).to(dtype) for channels in (5, 4)]
    teachers = [hard_maps(channels, seed=21).to(dtype) for channels in (5, 4)]
    students = [torch.cat((side, torch.zeros_like(side[:1]))) for side in students]
    teachers = [torch.cat((side, side[:1])) for side in teachers]
    inputs = [student.requires_grad_() for student in students]
    KDSVDLoss()(inputs, teachers).backward()
    (alone,) = ([side.detach()[:1].requires_grad_() for side in students],)
    KDSVDLoss()(alone, [side[:1] for side in teachers]).backward()
    for together, single in zip(inputs, alone, strict=True):
        assert together.grad.isfinite().all()
        assert not together.grad[-1].any()
        close = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(
            together.grad[:1] * len(together), single.grad, rtol=close, atol=close * 1e-3
        )


def test_a_first_vector_far_from_the_teachers_is_not_taken_for_the_closest():
    teachers = [spectrum(1.0, 0.1, 0.05, turn=False)] * 2
    students = [spectrum(0.1, 1.0, 0.05, turn=False)] * 2
    assert MainVector.of(students[0]).clear.all()
    loss = KDSVDLoss()(students, teachers)
    assert loss.item() == pytest.approx(by_hand(students, teachers), abs=1e-14)
    assert KDSVDLoss(spare=0)(students, teachers) > 1e-3


@pytest.mark.parametrize("k", [1, 2])
def test_gradient_equals_finite_differences(k):
    students, teachers = layers(*SHAPES, seed=1), layers(*SHAPES, seed=11)
    inputs = [student.requires_grad_() for student in students]
    assert torch.autograd.gradcheck(lambda *given: KDSVDLoss(k)(given, teachers), inputs)


@pytest.mark.parametrize("apart", [0.0, 1.0], ids=["exactly", "but for rounding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_singular_values_give_small_gradients(dtype, apart):
    values = 1 + apart * torch.finfo(dtype).eps * torch.arange(4, dtype=dtype)
    student = torch.diag(values).reshape(1, 4, 2, 2).repeat(2, 1, 1, 1).requires_grad_()
    teachers = layers((2, 4, 2, 2), (2, 4, 2, 2), seed=3, dtype=dtype)
    KDSVDLoss()([student, student * 2], teachers).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e2


def test_maps_of_zeros_give_no_gradient():
    student = torch.zeros(2, 4, 2, 2, requires_grad=True)
    teachers = layers((2, 4, 2, 2), (2, 4, 2, 2), seed=3, dtype=torch.float32)
    loss = KDSVDLoss()([student, student], teachers)
    loss.backward()
    assert loss.isfinite()
    assert not student.grad.any()


@pytest.mark.parametrize("k", [1, 2])
def test_identical_features_give_zero_and_no_gradient(k):
    teachers = layers(*SHAPES, seed=1)
    students = [teacher.clone().requires_grad_() for teacher in teachers]
    loss = KDSVDLoss(k)(students, teachers)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
    assert all(student.grad.abs().max() < 1e-10 for student in students)


def test_the_sign_of_a_map_does_not_matter():
    students, teachers = layers(*SHAPES, seed=1), layers(*SHAPES, seed=11)
    turned = [-students[0], *students[1:]]
    torch.testing.assert_close(KDSVDLoss()(turned, teachers), KDSVDLoss()(students, teachers))


def test_the_sign_that_a_decomposition_gives_the_teacher_does_not_matter(monkeypatch):
    students, teachers = layers(*SHAPES, seed=1), layers(*SHAPES, seed=11)
    expected = KDSVDLoss(k=2)(students, teachers)
    plain, calls = torch.linalg.eigh, iter([-1, 1, 1, -1, 1, -1])

    def turned(matrix):
        values, vectors = plain(matrix)
        return values, vectors * next(calls)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    torch.testing.assert_close(KDSVDLoss(k=2)(students, teachers), expected)


def test_the_students_scale_does_not_matter():
    students, teachers = layers(*SHAPES, seed=1), layers(*SHAPES, seed=11)
    scaled = [7 * student for student in students]
    torch.testing.assert_close(KDSVDLoss()(scaled, teachers), KDSVDLoss()(students, teachers))


def main_direction(shape, seed):
    """Return maps with one clear main direction, which differs from seed to seed."""
    profile = draw(shape[0], shape[1], 1, 1, seed=seed + 50)
    return profile * (1 + draw(shape[0], 1, *shape[2:], seed=seed).abs()) + 0.1 * draw(
        *shape, seed=seed + 90
    )


def test_half_precision_is_within_a_percent():
    students = [main_direction(shape, seed) for seed, shape in enumerate(SHAPES)]
    teachers = [main_direction(shape, seed + 7) for seed, shape in enumerate(SHAPES)]
    rounded = KDSVDLoss()(*([f.bfloat16() for f in side] for side in (students, teachers)))
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(KDSVDLoss()(students, teachers).item(), rel=0.01)


def test_under_autocast_the_gradient_keeps_its_value():
    teachers = layers(*SHAPES, seed=11, dtype=torch.float32)
    students = layers(*SHAPES, seed=1, dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        given = [student.clone().requires_grad_() for student in students]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = KDSVDLoss(k=2)(given, teachers)
        gradients.append(torch.autograd.grad(loss, given))
    for plain, cast in zip(*gradients, strict=True):
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k": 0}, r"KDSVDLoss: k must be a whole number >= 1, got 0"),
        ({"spare": -1}, r"KDSVDLoss: spare must be a whole number >= 0, got -1"),
        ({"width": 0.0}, r"KDSVDLoss: width must be a finite number > 0, got 0\.0"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        KDSVDLoss(**params)


def test_features_that_cannot_be_compared_are_refused():
    one, other = layers((2, 4, 2, 2), (2, 4, 2, 2)), layers((2, 5, 2, 2), (2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"student \(2, 4, 2, 2\) and teacher \(2, 5, 2, 2\).*1x1"):
        KDSVDLoss()(one, other)
    with pytest.raises(ValueError, match="at least two layers are needed"):
        KDSVDLoss()(one[0], one[0])
    with pytest.raises(ValueError, match=r"\(2, 4, 2, 2\) have fewer than k = 5 channels"):
        KDSVDLoss(k=5)(one, one)
    flat = layers((2, 4), (2, 4))
    with pytest.raises(ValueError, match=r"student \(2, 4\) and teacher \(2, 4\) must be maps"):
        KDSVDLoss()(flat, flat)


def test_printing_shows_every_parameter():
    assert repr(KDSVDLoss()) == "KDSVDLoss(k=1, spare=3, width=8.0)"
