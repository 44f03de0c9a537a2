"""MultiTeacherKDLoss: weights and averages written out, identities, extremes, and its errors."""

from __future__ import annotations

import doctest
import math
from itertools import product

import pytest
import torch
from torch import nn

import distill_kd.multi_teacher
from distill.testing import LossConformance
from distill_kd.kd import KDLoss
from distill_kd.multi_teacher import MultiTeacherKDLoss

WEIGHTINGS = ("mean", "confidence", "entropy")
AVERAGES = ("probabilities", "logits")
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)
each_average = pytest.mark.parametrize("average", AVERAGES)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def three(*shape, **how):
    return [logits(*shape, seed=seed, **how) for seed in (11, 12, 13)]


def labels(batch, classes):
    return torch.arange(batch) * 7 % classes


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def weights_by_hand(rows, label, weighting):
    """The weights of the teachers' logits ``rows`` of one sample."""
    if weighting == "mean":
        return [1 / len(rows)] * len(rows)
    if weighting == "confidence":
        wrong = [1 / softmax(row)[label] for row in rows]  # exp of the cross entropy
    else:
        wrong = [-sum(p * math.log(p) for p in softmax(row)) for row in rows]
    return [(1 - one / sum(wrong)) / (len(rows) - 1) for one in wrong]


def soft_by_hand(student, teachers, targets, temperature, weighting, average):
    """The mean divergence from the teachers' average, without beta and T^2."""
    total = 0.0
    for n, row in enumerate(student.tolist()):
        given = [teacher[n].tolist() for teacher in teachers]
        weights = weights_by_hand(given, int(targets[n]), weighting)
        if average == "probabilities":
            parts = [softmax(one, temperature) for one in given]
            wanted = [
                sum(map(math.prod, zip(weights, p, strict=True))) for p in zip(*parts, strict=True)
            ]
        else:
            mean = [
                sum(map(math.prod, zip(weights, z, strict=True))) for z in zip(*given, strict=True)
            ]
            wanted = softmax(mean, temperature)
        own = softmax(row, temperature)
        total += sum(p * math.log(p / q) for p, q in zip(wanted, own, strict=True))
    return total / len(student)


@each_weighting
@each_average
@pytest.mark.parametrize(("shape", "temperature"), list(product([(2, 2), (5, 7)], [0.7, 4.0])))
def test_equals_the_formula_written_out(shape, temperature, weighting, average):
    student, teachers, targets = logits(*shape), three(*shape), labels(*shape)
    loss = MultiTeacherKDLoss(temperature, 0.3, 1.7, weighting=weighting, average=average)

    soft = soft_by_hand(student, teachers, targets, temperature, weighting, average)
    hard = [-math.log(softmax(r)[t]) for r, t in zip(student.tolist(), targets, strict=True)]
    expected = 1.7 * temperature**2 * soft + 0.3 * sum(hard) / len(hard)
    assert loss(student, teachers, targets).item() == pytest.approx(expected, rel=1e-11)


@each_weighting
@each_average
def test_with_one_teacher_it_is_kd(weighting, average):
    student, teacher, targets = logits(4, 5), logits(4, 5, seed=1), labels(4, 5)
    settings = {"temperature": 3.0, "alpha": 0.2, "label_smoothing": 0.1}
    loss = MultiTeacherKDLoss(**settings, weighting=weighting, average=average)
    assert torch.equal(
        loss(student, [teacher], targets), KDLoss(**settings)(student, teacher, targets)
    )


@each_weighting
@each_average
def test_equal_teachers_are_one(weighting, average):
    student, teacher, targets = logits(4, 5), logits(4, 5, seed=1), labels(4, 5)
    loss = MultiTeacherKDLoss(3.0, 0.2, weighting=weighting, average=average)
    expected = KDLoss(3.0, 0.2)(student, teacher, targets)
    torch.testing.assert_close(loss(student, [teacher] * 3, targets), expected)


@each_weighting
def test_the_gradient_is_that_of_the_weighted_sum_of_single_losses(weighting):
    """As the authors of CA-MKD write it, whose value is larger by the teachers' disagreement."""
    student, teachers, targets = logits(5, 4).requires_grad_(), three(5, 4), labels(5, 4)
    loss = MultiTeacherKDLoss(4.0, 0.0, 1.0, weighting=weighting)(student, teachers, targets)
    (ours,) = torch.autograd.grad(loss, student)

    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(student)):
        given = [teacher[n].tolist() for teacher in teachers]
        for teacher, weight in zip(
            teachers, weights_by_hand(given, int(targets[n]), weighting), strict=True
        ):
            total = total + weight * KDLoss(4.0, 0.0, 1.0)(student[n : n + 1], teacher[n : n + 1])
    (theirs,) = torch.autograd.grad(total / len(student), student)
    torch.testing.assert_close(ours, theirs)
    assert loss < total / len(student)


def test_a_teacher_that_is_wrong_and_sure_of_it_does_not_count():
    student, targets = logits(3, 4), labels(3, 4)
    right = nn.functional.one_hot(targets, 4).double() * 3
    wrong = nn.functional.one_hot((targets + 1) % 4, 4).double() * 50
    loss = MultiTeacherKDLoss(2.0, 0.0, 1.0, weighting="confidence")
    expected = KDLoss(2.0, 0.0, 1.0)(student, right)
    torch.testing.assert_close(loss(student, [right, wrong], targets), expected)


def test_of_two_teachers_a_certain_one_counts_alone_by_entropy():
    student, unsure = logits(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    certain = nn.functional.one_hot(labels(3, 4), 4).double() * 100
    loss = MultiTeacherKDLoss(2.0, 0.0, 1.0, weighting="entropy")
    expected = KDLoss(2.0, 0.0, 1.0)(student, certain)
    torch.testing.assert_close(loss(student, [unsure, certain]), expected)


def test_class_probabilities_as_labels_weigh_as_their_mixture():
    student, teachers, targets = logits(4, 5), three(4, 5), labels(4, 5)
    loss = MultiTeacherKDLoss(weighting="confidence")
    soft = nn.functional.one_hot(targets, 5).double()
    torch.testing.assert_close(loss(student, teachers, soft), loss(student, teachers, targets))


@each_weighting
@each_average
def test_pixels_are_samples_with_classes_in_dimension_1(weighting, average):
    student, teachers = logits(2, 3, 4, 2), three(2, 3, 4, 2)
    targets = labels(16, 3).view(2, 4, 2)
    how = {"weighting": weighting, "average": average}
    dense = MultiTeacherKDLoss(reduction="positionmean", **how)(student, teachers, targets)

    def rows(image):
        return image.permute(0, 2, 3, 1).reshape(16, 3)

    flat = MultiTeacherKDLoss(**how)(rows(student), [rows(t) for t in teachers], targets.view(-1))
    torch.testing.assert_close(dense, flat)


@each_weighting
def test_words_have_their_classes_last(weighting):
    student, teachers, targets = logits(2, 6, 4), three(2, 6, 4), labels(12, 4).view(2, 6)
    words = MultiTeacherKDLoss(reduction="positionmean", weighting=weighting)
    flat = MultiTeacherKDLoss(weighting=weighting)(
        student.view(12, 4), [teacher.view(12, 4) for teacher in teachers], targets.view(12)
    )
    torch.testing.assert_close(words(student, teachers, targets), flat)


def test_ignored_positions_count_nothing_where_asked():
    student, teachers, targets = logits(4, 5), three(4, 5), labels(4, 5)
    targets[2] = -100
    kept = [0, 1, 3]
    loss = MultiTeacherKDLoss(weighting="confidence", ignore_soft=True, reduction="positionmean")
    expected = loss(student[kept], [teacher[kept] for teacher in teachers], targets[kept])
    torch.testing.assert_close(loss(student, teachers, targets), expected)


@each_weighting
@each_average
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_gradient_equals_finite_differences(weighting, average, temperature):
    student, teachers, targets = logits(3, 4).requires_grad_(), three(3, 4), labels(3, 4)
    loss = MultiTeacherKDLoss(temperature, 0.3, 0.9, weighting=weighting, average=average)
    assert torch.autograd.gradcheck(lambda s: loss(s, teachers, targets), student)


@each_weighting
@each_average
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_losses_and_gradients(weighting, average, scale, dtype):
    student = logits(4, 5, scale=scale, dtype=dtype).requires_grad_()
    teachers = three(4, 5, scale=scale, dtype=dtype)
    loss = MultiTeacherKDLoss(weighting=weighting, average=average)
    value = loss(student, teachers, labels(4, 5))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@each_weighting
@each_average
def test_a_class_that_all_exclude_counts_nothing(weighting, average):
    student, teachers, targets = logits(3, 5), three(3, 5), labels(3, 4)
    loss = MultiTeacherKDLoss(weighting=weighting, average=average)
    expected = loss(student[:, :4], [teacher[:, :4] for teacher in teachers], targets)
    for one in (student, *teachers):
        one[:, 4] = -math.inf
    torch.testing.assert_close(loss(student, teachers, targets), expected)


@each_weighting
def test_teachers_of_another_precision_than_the_student(weighting):
    student, teachers, targets = logits(4, 5), three(4, 5), labels(4, 5)
    loss = MultiTeacherKDLoss(weighting=weighting)
    mixed = [teachers[0].half(), teachers[1].bfloat16(), teachers[2].float()]
    found = loss(student.half(), mixed, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss(student, teachers, targets), rtol=0.02, atol=0)


class Wired(nn.Module):
    """The loss with a single teacher that can be given by name, beside one that is fixed."""

    def __init__(self, weighting, average):
        super().__init__()
        self.loss = MultiTeacherKDLoss(alpha=0.3, weighting=weighting, average=average)

    def forward(self, student, teacher, other, targets):
        return self.loss(student, [teacher, other], targets)


class TestConformance(LossConformance):
    teacher = "teacher"

    @pytest.fixture(autouse=True, params=list(product(WEIGHTINGS, AVERAGES)), ids="-".join)
    def how(self, request):
        self.kind = request.param

    def make(self):
        return Wired(*self.kind)

    def tensors(self, batch):
        student, teacher, other = (torch.randn(batch, 5) for _ in range(3))
        targets = labels(batch, 5)
        return {"student": student, "teacher": teacher, "other": other, "targets": targets}


def test_without_targets_the_soft_term_is_the_whole_loss():
    student, teachers = logits(4, 5), three(4, 5)
    loss = MultiTeacherKDLoss(4.0, alpha=0.3, weighting="entropy")
    alone = MultiTeacherKDLoss(4.0, alpha=0.0, beta=0.7, weighting="entropy")
    assert torch.equal(loss(student, teachers), alone(student, teachers, labels(4, 5)))


@pytest.mark.parametrize(
    ("teachers", "targets", "words"),
    [
        ([], None, "teachers must be a list of logits, .* got none"),
        (torch.zeros(2, 4, 5), None, "teachers must be a list of logits, .* got one tensor"),
        (
            [torch.zeros(4, 5), torch.zeros(4, 6)],
            None,
            r"got student \(4, 5\) and teacher \(4, 6\)",
        ),
        ([torch.zeros(4, 5)] * 2, None, "weighting confidence needs targets"),
        ([torch.zeros(4, 5)] * 2, torch.zeros(3).long(), r"class indices \(4,\)"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(teachers, targets, words):
    with pytest.raises(ValueError, match=f"MultiTeacherKDLoss.*{words}"):
        MultiTeacherKDLoss(weighting="confidence")(torch.zeros(4, 5), teachers, targets)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weighting": "best"}, "weighting must be one of 'mean', 'confidence', 'entropy'"),
        ({"average": "max"}, "average must be one of 'probabilities', 'logits'"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"alpha": -0.1}, "alpha must be a finite number >= 0"),
        ({"alpha": 1.5}, "alpha must be <= 1 unless beta is given"),
    ],
)
def test_parameters_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        MultiTeacherKDLoss(**settings)


def test_the_example_gives_what_it_says():
    result = doctest.testmod(distill_kd.multi_teacher)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("weighting", ["mean", "confidence", "entropy"])
def test_equal_teachers_are_one_at_ignored_labels_too(weighting):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator) for _ in range(2))
    targets = torch.tensor([0, -100, 2, -100, 1, 4])
    loss = MultiTeacherKDLoss(weighting=weighting)(student, [teacher, teacher], targets)
    torch.testing.assert_close(loss, KDLoss()(student, teacher, targets))
