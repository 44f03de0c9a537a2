"""Losses and auxiliary modules under bf16 autocast, as far as a stage with ``bf16`` runs them."""

from __future__ import annotations

import copy

import pytest
import torch

import distill_relational as relational

MODULES = {
    "CCKD": (relational.CCKDEmbedding, relational.CCKDLoss, {}),
    "ICKD": (relational.ICKDEmbedding, relational.ICKDLoss, {"like": True}),
}


def maps(*shape):
    return torch.randn(*shape).relu()


@pytest.mark.parametrize("name", MODULES)
def test_the_loss_of_a_module_under_autocast_is_that_in_full_precision_within_one_percent(name):
    make, make_loss, wants = MODULES[name]
    torch.manual_seed(0)
    student, teacher = maps(8, 12, 4, 4), maps(8, 24, 4, 4)
    module, loss = make(), make_loss()
    given = (student, teacher) if wants else (student,)
    module.setup(*given)
    goal = teacher if wants else torch.randn(8, 128)
    full = loss(copy.deepcopy(module)(*given), goal)
    with torch.autocast("cpu", torch.bfloat16):
        embedded = copy.deepcopy(module)(*given)
    reduced = loss(embedded.float(), goal)
    assert embedded.dtype == torch.bfloat16 or name == "ICKD"
    assert full.item() == pytest.approx(reduced.item(), rel=0.01)
    assert full.item() != reduced.item()


@pytest.mark.parametrize("name", relational.distill_losses())
def test_a_loss_under_autocast_keeps_its_value_and_gradient(name):
    loss = relational.distill_losses()[name]()
    torch.manual_seed(0)
    features = [torch.randn(8, 6, 3, 3) for _ in range(4 if name == "FSPLoss" else 2)]
    results = []
    for enabled in (False, True):
        student = features[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(student, *features[1:])
        value.backward()
        results.append((value.detach(), student.grad))
    for plain, cast in zip(*results, strict=True):
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)
