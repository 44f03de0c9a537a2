"""ICKDLoss and ICKDEmbedding: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_relational import ICKDEmbedding, ICKDLoss, channel_correlations

METHOD = "ickd"
NAMES = ("student_features", "teacher_features")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def correlations(rows):
    products = [[sum(map(float.__mul__, a, b)) for b in rows] for a in rows]
    return [[value / math.sqrt(sum(v**2 for v in row)) for value in row] for row in products]


def by_hand(student, teacher):
    """Return the sum of squares over all samples."""
    total = 0.0
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        rows = zip(correlations(s), correlations(t), strict=True)
        total += sum((a - b) ** 2 for pair in rows for a, b in zip(*pair, strict=True))
    return total


class TestICKDLoss(LossConformance):
    student, teacher = NAMES

    def make(self):
        return ICKDLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 3, 2, 2) for name in NAMES}


def test_loss_and_gradients_equal_the_reference(reference):
    if reference.variant == "batch_squared":
        weights = reference.params["weights"]
        sides = (
            [reference.tensor(f"{side}_feature_{i}") for i in range(len(weights))]
            for side in ("student", "teacher")
        )
        reference.check(ICKDLoss("batch_squared", weights)(*sides))
        return
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    embedding = ICKDEmbedding()
    embedding.setup(student, like=teacher)
    own = {"conv2d": "layers.conv", "l2norm": "layers.norm"}
    names = {n: f"{own[n.split('.')[0]]}.{n.split('.')[1]}" for n in reference.state("embed")}
    reference.load("embed", embedding, names)
    reference.check(ICKDLoss(reference.variant)(embedding(student, like=teacher), teacher))


@pytest.mark.parametrize("reduction", ["batch", "batch_squared"])
def test_equals_the_formula_written_out(reduction):
    students = [draw(3, 4, 2, 3, seed=1), draw(3, 2, 5, 1, seed=2)]
    teachers = [draw(3, 4, 1, 4, seed=3), draw(3, 2, 2, 2, seed=4)]
    samples = {"batch": 3, "batch_squared": 9}[reduction]
    each = [by_hand(s, t) / s.shape[1] for s, t in zip(students, teachers, strict=True)]
    loss = ICKDLoss(reduction)(students, teachers).item()
    assert loss == pytest.approx(sum(each) / samples, rel=1e-9)
    weighed = ICKDLoss(reduction, [2.0, 0.5])(students, teachers).item()
    assert weighed == pytest.approx((2 * each[0] + 0.5 * each[1]) / samples, rel=1e-9)


def test_a_weight_for_one_normalisation_is_a_multiple_of_that_for_the_other():
    student, teacher = draw(8, 4, 2, 2, seed=1), draw(8, 4, 2, 2, seed=2)
    squared, plain = ICKDLoss("batch_squared"), ICKDLoss()
    torch.testing.assert_close(500 * squared(student, teacher), 500 / 8 * plain(student, teacher))


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_samples_in_chunks_are_all_samples(monkeypatch, samples):
    student, teacher = draw(5, 4, 2, 3, seed=1).requires_grad_(), draw(5, 4, 3, 1, seed=2)
    whole = ICKDLoss()(student, teacher)
    monkeypatch.setattr(channel_correlations, "CHUNK_ON_CPU", samples * 16)
    chunked = ICKDLoss()(student, teacher)
    torch.testing.assert_close(chunked, whole)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (chunked, whole)]
    torch.testing.assert_close(*gradients)


def test_each_sample_gets_its_own_gradient():
    student, teacher = draw(4, 3, 6, seed=1).requires_grad_(), draw(4, 3, 5, seed=2)
    outer = draw(4, seed=3)
    compare = channel_correlations.correlation_difference
    assert torch.autograd.gradcheck(lambda s: outer * compare(s, teacher), student)


def test_identical_maps_give_0_without_a_gradient_whatever_their_scale():
    student = draw(3, 4, 2, 2, dtype=torch.float32).requires_grad_()
    loss = ICKDLoss()(student, 2 * student.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-6


def test_channels_of_zeros_correlate_with_nothing():
    student, teacher = draw(2, 3, 2, 2, seed=1), draw(2, 3, 2, 2, seed=2)
    student[:, 1] = 0
    student.requires_grad_()
    loss = ICKDLoss()(student, teacher)
    loss.backward()
    rest = [correlations(s) for s in student.detach()[:, [0, 2]].flatten(2).tolist()]
    goals = [correlations(t) for t in teacher.flatten(2).tolist()]
    total = 0.0
    for ours, wanted in zip(rest, goals, strict=True):
        padded = [[row[0], 0.0, row[1]] for row in ours]
        padded.insert(1, [0.0] * 3)
        rows = zip(padded, wanted, strict=True)
        total += sum((a - b) ** 2 for pair in rows for a, b in zip(*pair, strict=True))
    assert loss.item() == pytest.approx(total / 6)
    assert student.grad.isfinite().all()


def test_half_precision_is_within_a_percent():
    student, teacher = draw(4, 8, 4, 4, seed=1), draw(4, 8, 4, 4, seed=2)
    rounded = ICKDLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(ICKDLoss()(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_embedding_is_a_convolution_and_batch_norm(kernel_size):
    features = draw(4, 3, 5, 5, dtype=torch.float32)
    embedding = ICKDEmbedding(kernel_size=kernel_size)
    embedding.setup(features, like=torch.zeros(4, 6, 2, 2))
    convolved = F.conv2d(features, embedding.layers.conv.weight, padding=kernel_size // 2)
    expected = F.batch_norm(convolved, None, None, training=True)
    assert embedding(features).shape == (4, 6, 5, 5)
    torch.testing.assert_close(embedding(features), expected)
    assert embedding.layers.conv.bias is None
    assert f"in_channels=3, out_channels=6, kernel_size={kernel_size}" in repr(embedding)


def test_an_embedding_with_known_shapes_needs_no_setup():
    assert ICKDEmbedding(3, 7)(torch.zeros(2, 3, 4, 4)).shape == (2, 7, 4, 4)


def test_an_embedding_takes_the_type_of_wide_features():
    embedding = ICKDEmbedding(out_channels=2)
    embedding.setup(draw(2, 3, 2, 2))
    assert embedding(draw(2, 3, 2, 2)).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (ICKDLoss, {"reduction": "x"}, "reduction must be one of 'batch', 'batch_squared', got"),
        (ICKDLoss, {"layer_weights": [-1.0]}, "layer_weights must be finite numbers >= 0"),
        (ICKDLoss, {"gather": "x"}, "gather must be one of 'none', 'all', got 'x'"),
        (ICKDEmbedding, {"in_channels": 0}, "in_channels must be a whole number >= 1, or None"),
        (ICKDEmbedding, {"out_channels": 0}, "out_channels must be a whole number >= 1, or None"),
        (ICKDEmbedding, {"kernel_size": 2}, "kernel_size must be an odd number > 0, got 2"),
    ],
)
def test_a_parameter_out_of_range_is_named(make, params, message):
    with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
        make(**params)


def test_features_that_do_not_fit_are_refused():
    maps, others = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"student \(2, 3, 4, 4\) and teacher .*an ICKDEmbedding"):
        ICKDLoss()(maps, others)
    with pytest.raises(ValueError, match="got 2 of student_features, 1 of teacher_features"):
        ICKDLoss()([maps, maps], [maps])
    with pytest.raises(ValueError, match=r"teacher_features must be maps .* got \(2, 3\)"):
        ICKDLoss()(maps, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"ICKDEmbedding: in_channels is 4, but maps .* have 3"):
        ICKDEmbedding(4, 5)(maps)
    with pytest.raises(ValueError, match=r"ICKDEmbedding: out_channels is 4, but .* have 5"):
        ICKDEmbedding(out_channels=4).setup(maps, like=others)
    with pytest.raises(ValueError, match=r"ICKDEmbedding: features must be maps .* got \(2, 3\)"):
        ICKDEmbedding().setup(torch.zeros(2, 3), like=maps)
    with pytest.raises(ValueError, match="ICKDEmbedding: give out_channels, or wire"):
        ICKDEmbedding().setup(maps)
    with pytest.raises(RuntimeError, match="ICKDEmbedding has no layers yet: call setup"):
        ICKDEmbedding()(maps)


def test_printing_shows_every_parameter():
    assert repr(ICKDLoss()) == "ICKDLoss(reduction='batch', layer_weights=None, gather='none')"
