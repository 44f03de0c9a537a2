"""RKD's losses: reference numbers, the formulas written out, and memory that stays bounded."""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill.testing import LossConformance
from distill_relational import RKDAngleLoss, RKDDistanceLoss, RKDLoss, triplet_angles

METHOD = "rkd"
EVERY = pytest.mark.parametrize("make", [RKDDistanceLoss, RKDAngleLoss, RKDLoss])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def smooth(difference):
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def distance(one, other):
    return math.sqrt(max(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)), 1e-12))


def relative_distances(rows):
    batch = len(rows)
    pairs = [(i, j) for i in range(batch) for j in range(batch) if i != j]
    apart = {pair: distance(rows[pair[0]], rows[pair[1]]) for pair in pairs}
    mean = sum(apart.values()) / len(apart)
    return {pair: value / mean for pair, value in apart.items()}


def distance_by_hand(student, teacher):
    ours, theirs = (relative_distances(side.tolist()) for side in (student, teacher))
    return sum(smooth(ours[pair] - theirs[pair]) for pair in ours)


def direction(start, end):
    difference = [b - a for a, b in zip(start, end, strict=True)]
    length = math.sqrt(sum(value**2 for value in difference))
    return [value / max(length, 1e-12) for value in difference]


def cosine(rows, j, i, k):
    to_i, to_k = direction(rows[j], rows[i]), direction(rows[j], rows[k])
    return sum(a * b for a, b in zip(to_i, to_k, strict=True))


def angle_by_hand(student, teacher):
    ours, theirs = student.tolist(), teacher.tolist()
    every = range(len(ours))
    return sum(
        smooth(cosine(ours, j, i, k) - cosine(theirs, j, i, k))
        for j in every
        for i in every
        for k in every
    )


def published(student, teacher):
    """Return both losses as published code has them, differentiated by torch."""

    def distances(rows):
        apart = (rows.unsqueeze(1) - rows.unsqueeze(0)).square().sum(2).clamp(min=1e-12).sqrt()
        apart = apart * (1 - torch.eye(len(rows), dtype=rows.dtype))
        return apart / apart[apart > 0].mean()

    def angles(rows):
        units = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), dim=2)
        return torch.bmm(units, units.mT)

    return tuple(
        F.smooth_l1_loss(relation(student), relation(teacher)) for relation in (distances, angles)
    )


def gradients(loss, student, teacher):
    """Return the student's gradients in float32 and in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        given = student.to(dtype, copy=True).requires_grad_()
        loss(given, teacher.to(dtype)).backward()
        found.append(given.grad.double())
    return found


def relative_error(loss, student, teacher):
    """Return by how much gradients in float32 differ from float64's, of the largest element."""
    found, expected = gradients(loss, student, teacher)
    return (found - expected).abs().max() / expected.abs().max()


class TestRKDDistanceLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return RKDDistanceLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 5) for name in ("student_features", "teacher_features")}


class TestRKDAngleLoss(TestRKDDistanceLoss):
    def make(self):
        return RKDAngleLoss()


class TestRKDLoss(TestRKDDistanceLoss):
    def make(self):
        return RKDLoss()


class TestRKDAngleLossOfUnitVectors(TestRKDDistanceLoss):
    def make(self):
        return RKDAngleLoss(normalize_student=True, normalize_teacher=True)


def test_losses_and_gradients_equal_the_reference(reference):
    params, units = reference.params, reference.variant == "l2_normalized"
    features = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    distance_loss, angle_loss = (
        make(units, units, params["reduction"])(*features)
        for make in (RKDDistanceLoss, RKDAngleLoss)
    )
    reference.check(params["dist_factor"] * distance_loss + params["angle_factor"] * angle_loss)


def test_both_losses_in_one_equal_the_reference(reference):
    params, units = reference.params, reference.variant == "l2_normalized"
    weights = params["dist_factor"], params["angle_factor"]
    loss = RKDLoss(units, units, params["reduction"], "none", *weights)
    reference.check(loss(reference.tensor("student_feature"), reference.tensor("teacher_feature")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_both_losses_in_one_are_their_weighted_sum(reduction, weights, dtype):
    student, teacher = draw(9, 7, seed=1, dtype=dtype), draw(9, 4, seed=2, dtype=dtype)
    student.requires_grad_()
    terms = [
        weight * make(True, reduction=reduction)(student, teacher)
        for weight, make in zip(weights, (RKDDistanceLoss, RKDAngleLoss), strict=True)
    ]
    named = dict(zip(("distance_weight", "angle_weight"), weights, strict=True))
    both = RKDLoss(True, reduction=reduction, **named)(student, teacher)
    torch.testing.assert_close(both, sum(terms))
    found, expected = (torch.autograd.grad(loss, student)[0] for loss in (both, sum(terms)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("width", [2, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_the_formulas_written_out(width, reduction):
    student, teacher = 3 * draw(6, width, seed=1), draw(6, 4, seed=2) + 1
    distances = RKDDistanceLoss(reduction=reduction)(student, teacher)
    angles = RKDAngleLoss(reduction=reduction)(student, teacher)
    count = 6 if reduction == "mean" else 1
    assert distances.item() == pytest.approx(distance_by_hand(student, teacher) / count**2)
    assert angles.item() == pytest.approx(angle_by_hand(student, teacher) / count**3)


@EVERY
@pytest.mark.parametrize("sides", [(True, False), (False, True)])
def test_each_side_is_normalised_by_itself(make, sides):
    student, teacher = draw(5, 4, seed=1) + 1, draw(5, 3, seed=2) + 1
    units = [
        side / side.norm(dim=1, keepdim=True) if wanted else side
        for side, wanted in zip((student, teacher), sides, strict=True)
    ]
    torch.testing.assert_close(make(*sides)(student, teacher), make()(*units))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_those_that_torch_finds_for_the_published_code(dtype):
    student, teacher = draw(20, 8, seed=1, dtype=dtype), draw(20, 6, seed=2, dtype=dtype)
    student.requires_grad_()
    for ours, theirs in zip(
        (RKDDistanceLoss()(student, teacher), RKDAngleLoss()(student, teacher)),
        published(student, teacher),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
        expected = torch.autograd.grad(theirs, student, retain_graph=True)[0]
        found = torch.autograd.grad(ours, student, retain_graph=True)[0]
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_finite_differences(make, reduction):
    student, teacher = 3 * draw(5, 3, seed=1), draw(5, 4, seed=2)
    loss = make(reduction=reduction)
    assert torch.autograd.gradcheck(lambda given: loss(given, teacher), student.requires_grad_())


def test_samples_closer_than_a_millionth_pull_nothing_between_them():
    student, teacher = draw(6, 4, seed=1), draw(6, 4, seed=2)
    student[1] = student[0] + 1e-8
    student.requires_grad_()
    ours, theirs = RKDDistanceLoss()(student, teacher), published(student, teacher)[0]
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("vertices", [1, 3, 7])
def test_angles_in_chunks_are_all_angles(monkeypatch, vertices):
    student, teacher = draw(7, 4, seed=1).requires_grad_(), draw(7, 4, seed=2)
    whole = RKDAngleLoss()(student, teacher)
    monkeypatch.setattr(triplet_angles, "CHUNK_ON_CPU", vertices * 49)
    chunked = RKDAngleLoss()(student, teacher)
    torch.testing.assert_close(chunked, whole)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (chunked, whole)]
    torch.testing.assert_close(*gradients)


class Peak(TorchDispatchMode):
    """Notes the most bytes that tensors had together after an operation."""

    def __init__(self):
        super().__init__()
        self.bytes, self.alive = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(count for _, count in self.alive.values()))
        return result


def peak_of_angles(monkeypatch, vertices, width):
    """Return the bytes of 40 samples' angles, so many vertices at a time."""
    monkeypatch.setattr(triplet_angles, "CHUNK_ON_CPU", vertices * 40**2)
    student, teacher = (draw(40, width, seed=seed, dtype=torch.float32) for seed in (1, 2))
    student.requires_grad_()
    with Peak() as peak:
        RKDAngleLoss()(student, teacher).backward()
    return peak.bytes


@pytest.mark.parametrize("vertices", [1, 5, 40])
def test_memory_is_that_of_the_chunk_and_of_a_few_matrices(monkeypatch, vertices):
    taken, chunk = peak_of_angles(monkeypatch, vertices, 4), vertices * 40**2
    features = 2 * 40 * 4 * 8
    assert 24 * chunk < taken <= 24 * chunk + 64 * 40**2 + 2 * features


def test_well_spread_samples_take_less_memory(monkeypatch):
    taken, chunk = peak_of_angles(monkeypatch, 5, 64), 5 * 40**2
    features = 2 * 40 * 64 * 4
    assert 16 * chunk < taken <= 16 * chunk + 32 * 40**2 + 2 * features


@pytest.mark.parametrize("apart", [1e-3, 8])
def test_angles_in_chunks_of_float32_have_the_gradient_of_float64(monkeypatch, apart):
    student, teacher = (draw(16, 64, seed=seed, dtype=torch.float32) for seed in (1, 2))
    student[1] = student[0] + apart * draw(64, seed=3).float() / 8
    monkeypatch.setattr(triplet_angles, "CHUNK_ON_CPU", 3 * 16**2)
    found, expected = gradients(RKDAngleLoss(), student, teacher)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@EVERY
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("ratio", [1.5, 7.9, 8.1, 900, 1e5])
def test_gradients_are_those_of_float64_however_the_samples_are_spread(make, units, ratio):
    student, teacher = (draw(64, 256, seed=seed, dtype=torch.float32) for seed in (1, 2))
    for side in (student, teacher):
        step = draw(256, seed=3).float()
        side[6] = side[5] + step * (F.pdist(side).max() / ratio / step.norm())
    assert relative_error(make(units, units), student, teacher) < 2e-6


@EVERY
def test_gradients_are_those_of_float64_where_the_first_sample_is_far_away(make):
    student, teacher = (draw(64, 256, seed=seed, dtype=torch.float32) for seed in (1, 2))
    student[0] *= 6
    assert relative_error(make(), student, teacher) < 1e-6


@EVERY
def test_gradients_are_those_of_float64_for_maps_that_are_flattened(make):
    student, teacher = (draw(8, 64, 28, 28, seed=seed, dtype=torch.float32) for seed in (1, 2))
    assert relative_error(make(), student, teacher) < 5e-6


def test_distances_whose_squares_float32_does_not_hold_are_compared():
    student, teacher = (1e21 * draw(8, 5, seed=seed) for seed in (1, 2))
    loss = RKDDistanceLoss()
    found, expected = loss(student.float(), teacher.float()), loss(student, teacher)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_sample_gives_0(make, reduction):
    student = draw(0, 5).requires_grad_()
    loss = make(reduction=reduction)(student, draw(0, 4))
    loss.backward()
    assert loss.item() == 0


@EVERY
def test_gradients_in_autocast_have_all_digits(make):
    student, teacher = (draw(16, 8, seed=seed, dtype=torch.float32) for seed in (1, 2))
    student.requires_grad_()
    (expected,) = torch.autograd.grad(make()(student, teacher), student)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(make()(student, teacher), student)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@EVERY
@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-5])
def test_close_samples_have_the_gradient_of_float64(make, apart):
    student, teacher = (draw(16, 64, seed=seed, dtype=torch.float32) for seed in (1, 2))
    student[1] = student[0] + apart * draw(64, seed=3).float() / 8
    found, expected = gradients(make(), student, teacher)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@EVERY
def test_samples_far_from_the_origin_and_close_to_each_other_keep_their_digits(make):
    student, teacher = draw(8, 5, seed=1), draw(8, 5, seed=2).float()
    student[1] = student[0] + 1e-3 * draw(5, seed=3)
    given = (student + 100).float().requires_grad_()
    wide = given.detach().double().requires_grad_()
    losses = make()(given, teacher), make()(wide, teacher.double())
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    difference = (given.grad - wide.grad).abs().max()
    assert difference < 1e-5 * wide.grad.abs().max()


@EVERY
def test_identical_features_give_0_whatever_their_scale(make):
    student = draw(5, 4).requires_grad_()
    loss = make()(student, 3 * student.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-7


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_give_finite_losses_and_gradients_of_usual_size(make, dtype):
    student, teacher = draw(6, 4, seed=1, dtype=dtype), draw(6, 4, seed=2, dtype=dtype)
    student[3] = student[0]
    student[4:] = 0
    student.requires_grad_()
    loss = make()(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.abs().max() < 10
    distances = distance_by_hand(student.detach(), teacher) / 6**2
    angles = angle_by_hand(student.detach(), teacher) / 6**3
    expected = {
        RKDDistanceLoss: distances,
        RKDAngleLoss: angles,
        RKDLoss: distances + 2 * angles,
    }
    assert loss.item() == pytest.approx(expected[make], rel=1e-5)


@EVERY
def test_few_samples_have_nothing_to_compare(make):
    for batch in (1, 2):
        student = draw(batch, 4, seed=1).requires_grad_()
        loss = make()(student, draw(batch, 3, seed=2))
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert student.grad.abs().max() < 1e-12


@EVERY
def test_a_gradient_is_not_to_be_differentiated_again(make):
    student = draw(4, 4, seed=1).requires_grad_()
    loss = make()(student.tanh(), draw(4, 4, seed=2))
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(loss, student, create_graph=True)


@EVERY
def test_maps_are_flattened(make):
    student, teacher = draw(4, 3, 2, 2, seed=1), draw(4, 5, 1, 1, seed=2)
    flat = make()(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(make()(student, teacher), flat)


@EVERY
def test_half_precision_is_within_a_percent(make):
    student, teacher = draw(16, 8, seed=1), draw(16, 8, seed=2)
    rounded = make()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(make()(student, teacher).item(), rel=0.01)


@EVERY
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"reduction": "none"}, "reduction must be one of 'mean', 'sum', got 'none'"),
        ({"gather": "some"}, "gather must be one of 'none', 'all', got 'some'"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, params, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(**params)


@EVERY
def test_features_that_cannot_be_compared_are_refused(make):
    wanted = r"must be features \(B, \.\.\.\) of the same batch"
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(4, 3\) " + wanted):
        make()(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"student \(2,\) and teacher \(2, 3\) " + wanted):
        make()(torch.zeros(2), torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["distance_weight", "angle_weight"])
def test_a_weight_below_0_is_refused(name):
    with pytest.raises(ValueError, match=f"RKDLoss: {name} must be a finite number >= 0, got -1"):
        RKDLoss(**{name: -1})


def test_printing_shows_every_parameter():
    assert repr(RKDAngleLoss(True)) == (
        "RKDAngleLoss(normalize_student=True, normalize_teacher=False, reduction='mean', "
        "gather='none')"
    )
