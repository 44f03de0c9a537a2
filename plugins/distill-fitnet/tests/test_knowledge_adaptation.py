"""Knowledge adaptation: reference numbers, formulas by hand, precision, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.factor_transfer import FTLoss
from distill_fitnet.knowledge_adaptation import (
    AffinityLoss,
    CodeNormLoss,
    KTAAdapter,
    KTALoss,
    outer_distance,
)

METHOD = "ktaad"
FORMS = ["channels", "positions"]


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equals_the_reference_numbers(reference):
    if reference.variant == "regularization":
        reference.check(CodeNormLoss(reference.params["p"])(reference.tensor("code")))
        return
    loss = {"kta": KTALoss, "affinity": AffinityLoss}[reference.variant](**reference.params)
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    reference.check(loss(student, teacher))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (1, 3), (2, 2), (3, 1.5)])
def test_kta_equals_the_formula_written_out(p, q, reduction):
    student, teacher = maps(3, 2, 3, 4, seed=1), maps(3, 2, 3, 4, seed=2)
    samples = []
    for pair in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        s, t = ([v / sum(abs(w) ** q for w in f) ** (1 / q) for v in f] for f in pair)
        samples.append(sum(abs(a - b) ** p for a, b in zip(s, t, strict=True)) ** (1 / p))
    expected = sum(samples)
    if reduction == "mean":
        expected /= 3 * (2 * 3 * 4 if p == 1 else 1)
    loss = KTALoss(p, q, reduction)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_kta_with_norm_2_is_factor_transfer():
    student, teacher = maps(3, 4, 5, 5, seed=1), maps(3, 4, 5, 5, seed=2)
    torch.testing.assert_close(KTALoss()(student, teacher), FTLoss()(student, teacher))


def vectors_by_hand(sample, form):
    """Return the normalised vectors of one sample: a channel's over positions, or the reverse."""
    rows = sample.flatten(1).tolist()
    vectors = rows if form == "channels" else [list(v) for v in zip(*rows, strict=True)]
    return [[v / math.sqrt(sum(w * w for w in vector)) for v in vector] for vector in vectors]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def affinity_by_hand(student, teacher, form):
    total = 0.0
    positions = student[0, 0].numel()
    for pair in zip(student, teacher, strict=True):
        s, t = (vectors_by_hand(sample, form) for sample in pair)
        if form == "channels":
            for a, b in zip(s, t, strict=True):
                squares = [
                    (a[i] * a[j] - b[i] * b[j]) ** 2
                    for i in range(positions)
                    for j in range(positions)
                ]
                total += math.sqrt(sum(squares)) / positions
        else:
            squares = [
                (dot(s[i], s[j]) - dot(t[i], t[j])) ** 2
                for i in range(positions)
                for j in range(positions)
            ]
            total += math.sqrt(sum(squares)) / positions
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_affinity_equals_the_formula_written_out(form, reduction):
    student, teacher = maps(2, 3, 3, 4, seed=1), maps(2, 3, 3, 4, seed=2)
    expected = affinity_by_hand(student, teacher, form) / (2 if reduction == "mean" else 1)
    loss = AffinityLoss(form, reduction)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_maps_are_pooled_before_their_affinity(form):
    student, teacher = maps(2, 3, 6, 4, seed=1), maps(2, 3, 6, 4, seed=2)
    expected = AffinityLoss(form)(F.avg_pool2d(student, 2), F.avg_pool2d(teacher, 2))
    torch.testing.assert_close(AffinityLoss(form, pool=2)(student, teacher), expected)
    small = F.avg_pool2d(teacher, 2)
    torch.testing.assert_close(AffinityLoss(form)(student, small), expected)


def test_pooling_leaves_no_position_out():
    student, teacher = maps(1, 2, 3, 3, seed=1).requires_grad_(), maps(1, 2, 3, 3, seed=2)
    AffinityLoss(pool=2)(student, teacher).backward()
    assert (student.grad != 0).all()


def test_channels_may_differ_where_positions_are_compared():
    assert AffinityLoss("positions")(maps(2, 3, 4, 4), maps(2, 5, 4, 4)).isfinite()


def test_the_sign_of_a_channel_changes_no_affinity():
    student, teacher = maps(2, 3, 4, 4, seed=1), maps(2, 3, 4, 4, seed=2)
    torch.testing.assert_close(AffinityLoss()(-student, teacher), AffinityLoss()(student, teacher))


@pytest.mark.parametrize("form", FORMS)
def test_affinity_of_identical_features_is_exactly_zero_with_a_finite_gradient(form):
    student = maps(2, 3, 4, 4).float().requires_grad_()
    loss = AffinityLoss(form)(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert student.grad.isfinite().all()


def test_outer_distance_keeps_its_digits_for_nearly_equal_vectors():
    a = F.normalize(maps(50, seed=1), dim=0)
    b = F.normalize(a + 1e-5 * maps(50, seed=2), dim=0)
    a, b = a.float(), b.float()  # exact below: the same numbers, widened
    exact = torch.linalg.matrix_norm(a.double().outer(a.double()) - b.double().outer(b.double()))
    assert outer_distance(a, b).item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_outer_distance_holds_for_vectors_of_any_length(scale):
    a, b = maps(6, seed=1), scale * maps(6, seed=2)
    expected = torch.linalg.matrix_norm(a.outer(a) - b.outer(b))
    torch.testing.assert_close(outer_distance(a, b), expected)


def test_affinity_of_channels_needs_no_matrix_of_positions():
    student, teacher = maps(1, 1, 400, 400, dtype=torch.float32), maps(1, 1, 400, 400).float()
    assert AffinityLoss()(student, teacher).isfinite()  # a matrix would take 102 GB


@pytest.mark.parametrize(("p", "shape"), [(1, (3, 4)), (2, (2, 3, 4)), (3, (2, 1, 2, 2))])
def test_code_norm_equals_the_formula_written_out(p, shape):
    code = maps(*shape)
    expected = sum(abs(v) ** p for v in code.flatten().tolist()) ** (1 / p)
    assert CodeNormLoss(p)(code).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "loss", [KTALoss(), KTALoss(p=2, q=1), AffinityLoss(), AffinityLoss("positions", pool=2)]
)
def test_losses_sum_over_layers(loss):
    students = [maps(2, 3, 4, 4, seed=1), maps(2, 5, 2, 2, seed=2)]
    teachers = [maps(2, 3, 4, 4, seed=3), maps(2, 5, 2, 2, seed=4)]
    expected = sum(loss(s, t) for s, t in zip(students, teachers, strict=True))
    torch.testing.assert_close(loss(students, teachers), expected)


@pytest.mark.parametrize("loss", [KTALoss(), AffinityLoss(), AffinityLoss("positions")])
def test_losses_of_bfloat16_are_near_those_of_float32(loss):
    student, teacher = maps(4, 8, 6, 6).float(), maps(4, 8, 6, 6, seed=1).float()
    rounded = loss(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss(student, teacher).item(), rel=0.01)


def test_code_norm_of_bfloat16_is_near_that_of_float32():
    code = maps(4, 8, 6, 6).float()
    rounded = CodeNormLoss()(code.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(CodeNormLoss()(code).item(), rel=0.01)


class TestKTALoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return KTALoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 3, 4, 4) for name in (self.student, self.teacher)}


class TestAffinityLoss(TestKTALoss):
    def make(self):
        return AffinityLoss()


class TestAffinityLossOfPositions(TestKTALoss):
    def make(self):
        return AffinityLoss("positions")


class TestCodeNormLoss(LossConformance):
    student = "code"

    def make(self):
        return CodeNormLoss(p=2)

    def tensors(self, batch):
        return {"code": torch.randn(batch, 3, 2, 2)}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_adapter_is_a_convolution_with_batch_norm_and_relu(batch_norm, relu):
    features, like = maps(2, 3, 5, 4), maps(2, 7, 5, 4)
    adapter = KTAAdapter(batch_norm=batch_norm, relu=relu)
    adapter.setup(features, like)
    project = adapter.layers[0].project
    expected = F.conv2d(features, project.weight, project.bias, padding=1)
    assert project.weight.shape == (7, 3, 3, 3)
    if batch_norm:
        expected = F.batch_norm(expected, None, None, training=True)
    if relu:
        expected = expected.clamp(min=0)
    torch.testing.assert_close(adapter(features, like), expected)


def test_adapter_brings_a_map_to_the_size_of_the_code():
    adapter = KTAAdapter()
    adapter.setup(maps(2, 3, 4, 4), maps(2, 7, 8, 6))
    assert adapter(maps(2, 3, 4, 4), maps(2, 7, 8, 6)).shape == (2, 7, 8, 6)


def test_given_channels_make_the_same_adapter_as_channels_found():
    features, like = maps(2, 3, 4, 4).float(), maps(2, 7, 4, 4).float()
    torch.manual_seed(0)
    found = KTAAdapter()
    found.setup(features, like)
    torch.manual_seed(0)
    explicit = KTAAdapter(3, 7)
    torch.testing.assert_close(explicit(features), found(features, like), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KTALoss(p=0.5), r"KTALoss: p must be a finite number >= 1, got 0\.5"),
        (lambda: KTALoss(q=math.inf), r"KTALoss: q must be .* got inf"),
        (lambda: KTALoss(reduction="none"), r"KTALoss: reduction must be one of 'mean', 'sum'"),
        (lambda: AffinityLoss("pixels"), r"form must be one of 'channels', 'positions', got"),
        (lambda: AffinityLoss(reduction="none"), r"AffinityLoss: reduction must be one of"),
        (lambda: AffinityLoss(pool=0), r"pool must be a whole number >= 1, got 0"),
        (lambda: CodeNormLoss(p=0.0), r"CodeNormLoss: p must be .* got 0\.0"),
        (lambda: KTAAdapter(0), r"KTAAdapter: in_channels must be a whole number >= 1"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "message"),
    [
        (KTALoss(), (2, 3, 4, 4), (2, 5, 4, 4), r"KTALoss: .* with a KTAAdapter"),
        (AffinityLoss(), (2, 3, 4, 4), (2, 5, 4, 4), r"AffinityLoss: .* with a KTAAdapter"),
        (AffinityLoss(), (2, 3), (2, 3), r"AffinityLoss: .* must be maps"),
        (AffinityLoss("positions"), (2, 3, 4, 4), (1, 3, 4, 4), r"of the same batch"),
    ],
)
def test_features_that_do_not_fit_are_refused(loss, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.ones(student), torch.ones(teacher))
