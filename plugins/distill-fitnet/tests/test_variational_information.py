"""VIDLoss and VIDRegressor: reference numbers, the formula written out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.variational_information import VIDLoss, VIDRegressor

METHOD = "vid"


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_variances(loss, *raw):
    with torch.no_grad():
        for parameter, values in zip(loss.raw_variances, raw, strict=True):
            parameter.copy_(values)
    return loss


class TestVIDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return with_variances(VIDLoss(channels=3), torch.tensor([0.5, 2.0, -1.0]))

    def tensors(self, batch):
        shape = (batch, 3, 2, 2)
        return {"student_features": torch.randn(shape), "teacher_features": torch.randn(shape)}


def test_loss_and_gradients_equal_the_reference(reference):
    params = reference.params
    student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
    regressor = VIDRegressor(mid_channels=params["mid_channels"])
    regressor.setup(student, teacher)
    loss = VIDLoss(initial_variance=params["init_pred_var"], eps=params["eps"])
    loss.setup(regressor(student, teacher), teacher)
    both = nn.ModuleDict({"regressor": regressor, "loss": loss})
    names = {f"{number}.weight": f"regressor.layers.0.{number}.weight" for number in (0, 2, 4)}
    reference.load("regressor", both, {**names, "log_scale": "loss.raw_variances.0"})
    reference.check(loss(regressor(student, teacher), teacher))


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (2, 3), (2, 3, 6)])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_equals_the_formula_written_out(shape, eps):
    student, teacher = draw(*shape, seed=1), draw(*shape, seed=2)
    raw = draw(shape[1], seed=3, dtype=torch.float32)
    loss = with_variances(VIDLoss(shape[1], eps=eps), raw)

    variances = [math.log(1 + math.exp(a)) + eps for a in raw.tolist()]
    total = 0.0
    for b in range(shape[0]):
        for c, variance in enumerate(variances):
            for s, t in zip(
                student[b, c].flatten().tolist(), teacher[b, c].flatten().tolist(), strict=True
            ):
                total += 0.5 * ((s - t) ** 2 / variance + math.log(variance))
    value = loss.double()(student, teacher)
    assert value.item() == pytest.approx(total / student.numel(), rel=1e-12)


@pytest.mark.parametrize("variance", [0.01, 1.0, 5.0, 200.0])
def test_every_variance_starts_at_the_given_one(variance):
    loss = VIDLoss([2, 3], initial_variance=variance)
    for raw in loss.raw_variances:
        torch.testing.assert_close(F.softplus(raw) + 1e-5, torch.full_like(raw, variance))


def test_the_default_start_is_that_of_the_published_code():
    assert VIDLoss(1).raw_variances[0].item() == pytest.approx(math.log(math.exp(5 - 1e-5) - 1))


def test_layers_are_summed():
    students = [draw(2, 3, 4, 4, seed=1), draw(2, 5, 2, 2, seed=2)]
    teachers = [draw(2, 3, 4, 4, seed=3), draw(2, 5, 2, 2, seed=4)]
    both = VIDLoss([3, 5])(students, teachers)
    first, second = VIDLoss(3)(students[0], teachers[0]), VIDLoss(5)(students[1], teachers[1])
    torch.testing.assert_close(both, first + second)


@pytest.mark.parametrize(("ours", "theirs"), [(8, 4), (4, 8)])
def test_the_larger_map_is_pooled_first(ours, theirs):
    student, teacher = draw(2, 3, ours, ours, seed=1), draw(2, 3, theirs, theirs, seed=2)
    small_student, small_teacher = (
        F.avg_pool2d(feature, feature.shape[-1] // 4) for feature in (student, teacher)
    )
    loss = VIDLoss(3)
    torch.testing.assert_close(loss(student, teacher), loss(small_student, small_teacher))


def test_the_regressor_pools_a_larger_map_before_it_predicts():
    student, teacher = draw(2, 3, 8, 6, seed=1), draw(2, 5, 4, 3, seed=2)
    regressor = VIDRegressor()
    regressor.setup(student, teacher)
    pooled = F.avg_pool2d(student, 2)
    torch.testing.assert_close(regressor(student, teacher), regressor(pooled, teacher))
    assert regressor(student).shape == (2, 5, 8, 6)


def test_the_regressor_keeps_a_smaller_map():
    student, teacher = draw(2, 3, 2, 2, seed=1), draw(2, 5, 4, 4, seed=2)
    regressor = VIDRegressor()
    regressor.setup(student, teacher)
    torch.testing.assert_close(regressor(student, teacher), regressor(student))


@pytest.mark.parametrize(("mid_channels", "middle"), [(None, 5), (7, 7)])
def test_the_regressor_has_three_convolutions_without_bias(mid_channels, middle):
    layers = VIDRegressor(3, 5, mid_channels).layers[0]
    shapes = [tuple(parameter.shape) for parameter in layers.parameters()]
    assert shapes == [(middle, 3, 1, 1), (middle, middle, 1, 1), (5, middle, 1, 1)]


def test_setup_makes_the_variances_that_given_channels_make():
    features = [draw(2, 3, 4, 4), draw(2, 5)]
    found, given = VIDLoss(), VIDLoss([3, 5])
    found.setup(features, features)
    given.setup(features, features)
    assert list(found.state_dict()) == list(given.state_dict()) != []
    assert repr(found) == repr(given)
    assert found.raw_variances[0].dtype == torch.float64
    torch.testing.assert_close(found(features, features), given(features, features))


def test_setup_leaves_float32_for_reduced_precision():
    loss = VIDLoss()
    loss.setup(draw(2, 3).bfloat16(), draw(2, 3).bfloat16())
    assert loss.raw_variances[0].dtype == torch.float32


def test_setup_takes_maps_of_different_size():
    loss = VIDLoss()
    loss.setup(draw(2, 3, 8, 8), draw(2, 3, 4, 4))
    assert loss.channels == [3]


def test_a_restored_state_gives_the_same_loss():
    student, teacher = draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    trained = with_variances(VIDLoss(3), torch.tensor([0.1, 3.0, -2.0]))
    restored = VIDLoss()
    restored.setup(student.float(), teacher.float())
    assert restored(student, teacher) != trained(student, teacher)
    restored.load_state_dict(trained.state_dict())
    torch.testing.assert_close(restored(student, teacher), trained(student, teacher))


def test_a_step_moves_the_variances_towards_the_squared_distance():
    student, teacher = torch.zeros(2, 2, 3, 3), torch.full((2, 2, 3, 3), 0.1)
    loss = VIDLoss(2)
    loss(student, teacher).backward()
    assert (loss.raw_variances[0].grad > 0).all()  # 5 is too much for a distance of 0.01


def test_half_precision_is_within_a_percent():
    student, teacher = draw(4, 8, 3, 3, seed=1), draw(4, 8, 3, 3, seed=2)
    rounded = VIDLoss(8)(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(VIDLoss(8)(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"eps": -1e-3}, r"VIDLoss: eps must be a finite number >= 0, got -0\.001"),
        ({"initial_variance": 0.0}, r"VIDLoss: initial_variance must be .* > eps, .* got 0\.0"),
        ({"initial_variance": math.inf}, r"VIDLoss: initial_variance .* got inf"),
        ({"channels": 0}, r"VIDLoss: channels must be a whole number >= 1.* got 0"),
    ],
)
def test_a_parameter_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        VIDLoss(**params)


def test_no_channels_between_the_convolutions_are_refused():
    with pytest.raises(ValueError, match=r"VIDRegressor: mid_channels must be .* got 0"):
        VIDRegressor(mid_channels=0)


def test_features_of_different_channels_are_refused_with_both_shapes():
    with pytest.raises(
        ValueError, match=r"student \(2, 3, 4, 4\) and teacher \(2, 5, 4, 4\).*VIDR"
    ):
        VIDLoss(3)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))


def test_other_channels_than_built_for_are_refused():
    features = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"channels is \[5\], but .* \(2, 3, 4, 4\) have \[3\]"):
        VIDLoss(5).setup(features, features)
    with pytest.raises(ValueError, match=r"built for 5 channels, got \(2, 3, 4, 4\)"):
        VIDLoss(5)(features, features)
    with pytest.raises(ValueError, match=r"built for 2 features, got 1"):
        VIDLoss([3, 5])(features, features)


def test_forward_before_setup_says_what_to_do():
    with pytest.raises(RuntimeError, match="VIDLoss has no variances yet: call setup"):
        VIDLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
