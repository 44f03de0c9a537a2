"""SRRL: reference numbers, formulas written out, and the teacher's head as it is wired."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.softmax_regression import SRRLConnector, SRRLLoss

METHOD = "srrl"


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def connector(seed=0):
    torch.manual_seed(seed)
    return SRRLConnector(6, 8)


def names(module):
    """Return where the connector keeps what the reference calls ``conv.*`` and ``bn.*``."""
    return {f"{n.split('.')[-2]}.{n.split('.')[-1]}": n for n in module.state_dict()}


def test_reference_numbers_hold(reference):
    loss = SRRLLoss(reference.params["alpha"], reference.params["beta"])
    student, teacher = map(reference.tensor, ("student_feature", "teacher_feature"))
    if reference.variant == "losses":
        logits = map(reference.tensor, ("student_logits_by_teacher", "teacher_logits"))
        reference.check(loss(student, teacher, *logits))
        return
    module = SRRLConnector(6, 8)
    reference.load("connector", module, names(module))
    head = nn.Linear(8, 10).requires_grad_(False)
    reference.load("teacher_fc", head)
    adapted = module(student, teacher)
    logits = head(adapted["pooled"]), head(teacher.mean((2, 3)))
    reference.check(loss(adapted["map"], teacher, *logits))


def loss_by_hand(student, teacher, logits, teacher_logits, alpha, beta):
    batch, channels = student.shape[:2]
    features = 0.0
    for b in range(batch):
        for c in range(channels):
            gap = student[b, c].sum().item() / student[b, c].numel()
            features += (gap - teacher[b, c].sum().item() / teacher[b, c].numel()) ** 2
    rows = zip(logits.flatten().tolist(), teacher_logits.flatten().tolist(), strict=True)
    logit_term = sum((s - t) ** 2 for s, t in rows) / logits.numel()
    return alpha * features / (batch * channels) + beta * logit_term


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, 2.0), (0.7, 0.0)])
def test_equals_the_formula_written_out_for_maps_of_any_size(alpha, beta):
    student, teacher = randn(3, 4, 5, 2, dtype=torch.float64), randn(3, 4, 3, 3, seed=1).double()
    logits = randn(3, 7, seed=2, dtype=torch.float64), randn(3, 7, seed=3, dtype=torch.float64)
    loss = SRRLLoss(alpha, beta)(student, teacher, *logits)
    expected = loss_by_hand(student, teacher, *logits, alpha, beta)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_pooled_features_count_as_their_maps():
    student, teacher = randn(3, 4, 5, 5), randn(3, 4, 2, 2, seed=1)
    logits = randn(3, 7, seed=2), randn(3, 7, seed=3)
    pooled = SRRLLoss()(student.mean((2, 3)), teacher.mean((2, 3)), *logits)
    torch.testing.assert_close(pooled, SRRLLoss()(student, teacher, *logits))


class TestSRRLLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return SRRLLoss()

    def tensors(self, batch):
        return {
            "student_features": torch.randn(batch, 3, 4, 4),
            "teacher_features": torch.randn(batch, 3, 4, 4),
            "student_logits": torch.randn(batch, 5),
            "teacher_logits": torch.randn(batch, 5),
        }


class TestSRRLLossOfLogits(TestSRRLLoss):
    student = "student_logits"
    teacher = "teacher_logits"


def test_bfloat16_is_within_one_percent():
    given = [randn(4, 6, 3, 3), randn(4, 6, 3, 3, seed=1), randn(4, 9, seed=2), randn(4, 9, seed=3)]
    loss = SRRLLoss()(*(tensor.bfloat16() for tensor in given))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SRRLLoss()(*given).item(), rel=0.01)


def test_gradients_pass_through_the_teachers_head_and_not_into_it():
    module, head = connector(), nn.Linear(8, 5).requires_grad_(False)
    student = randn(4, 6, 3, 3).requires_grad_()
    adapted = module(student)
    SRRLLoss(alpha=0.0)(
        adapted["map"], randn(4, 8, 3, 3), head(adapted["pooled"]), randn(4, 5)
    ).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert head.weight.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_the_connector_equals_its_definition_written_out(training):
    module = connector().double().train(training)
    features = randn(3, 6, 4, 5, dtype=torch.float64)
    state = {name: module.state_dict()[where] for name, where in names(module).items()}
    x = torch.einsum("oi,bihw->bohw", state["conv.weight"][:, :, 0, 0], features)
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, variance = state["bn.running_mean"].clone(), state["bn.running_var"].clone()
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    expected = x.clamp(min=0)
    given = module(features)
    torch.testing.assert_close(given["map"], expected)
    torch.testing.assert_close(given["pooled"], expected.mean((2, 3)))


def test_weights_start_as_published():
    module = SRRLConnector(128, 256)
    state = {name: module.state_dict()[where] for name, where in names(module).items()}
    assert state["conv.weight"].std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    assert "conv.bias" not in state


def test_setup_finds_what_the_constructor_may_be_given():
    module = SRRLConnector()
    torch.manual_seed(0)
    module.setup(randn(2, 6, 4, 4), randn(2, 8, 2, 2))
    explicit, found = connector().state_dict(), module.state_dict()
    assert list(found) == list(explicit)
    assert all(torch.equal(found[name], explicit[name]) for name in explicit)


def test_setup_takes_the_type_of_double_features():
    module = SRRLConnector()
    module.setup(randn(2, 6, 4, 4, dtype=torch.float64), randn(2, 8, 2, 2))
    assert module(randn(2, 6, 4, 4, dtype=torch.float64))["pooled"].dtype == torch.float64


def test_loaded_weights_give_the_same_features():
    module, other, features = connector(0).eval(), connector(1).eval(), randn(2, 6, 4, 4)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(features)["map"], other(features)["map"])


def test_what_does_not_fit_is_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"in_channels is \[6\].*\(2, 5, 4, 4\)"):
        connector().setup(randn(2, 5, 4, 4), randn(2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"SRRLConnector: features must be maps.*\(2, 6\)"):
        SRRLConnector().setup(randn(2, 6), randn(2, 8))
    with pytest.raises(ValueError, match=r"student \(2, 6\) and teacher \(2, 8\).*SRRLConnector"):
        SRRLLoss()(randn(2, 6, 4, 4), randn(2, 8, 4, 4), randn(2, 5), randn(2, 5))
    with pytest.raises(ValueError, match=r"student \(2, 5\) and teacher \(2, 7\).*teacher's head"):
        SRRLLoss()(randn(2, 6, 4, 4), randn(2, 6, 4, 4), randn(2, 5), randn(2, 7))


def test_a_forward_before_setup_says_what_is_missing():
    with pytest.raises(RuntimeError, match="SRRLConnector has no layers yet"):
        SRRLConnector()(randn(2, 6, 4, 4))


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_weight_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"SRRLLoss: {name} must be a finite number >= 0, got"):
        SRRLLoss(**{name: value})


def test_the_loss_is_the_mean_of_squares_of_both():
    student, teacher = randn(3, 4), randn(3, 4, seed=1)
    logits = randn(3, 7, seed=2), randn(3, 7, seed=3)
    expected = F.mse_loss(student, teacher) + 5 * F.mse_loss(*logits)
    torch.testing.assert_close(SRRLLoss(beta=5.0)(student, teacher, *logits), expected)
