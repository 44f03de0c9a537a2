"""Auxiliary modules under bf16 autocast, as a stage with ``precision: bf16`` runs them."""

from __future__ import annotations

import copy

import pytest
import torch

import distill_fitnet as fit


def maps(*sizes):
    """Maps after a ReLU, as (channels, height and width) says."""
    return [torch.randn(8, c, hw, hw).relu() for c, hw in sizes]


def tokens(*widths):
    return [torch.randn(8, 17, width) for width in widths]


STUDENT = [(8, 8), (12, 4)]
TEACHER = [(16, 8), (24, 4)]
CASES = {
    "FitNet": (fit.ConvRegressor, fit.HintLoss, lambda: (maps((8, 8))[0], maps((16, 4))[0])),
    "AB": (fit.ABConnector, fit.ABLoss, lambda: (maps(*STUDENT), maps(*TEACHER))),
    "VID": (fit.VIDRegressor, fit.VIDLoss, lambda: (maps(*STUDENT), maps(*TEACHER))),
    "OFD": (fit.OFDConnector, fit.HintLoss, lambda: (maps(*STUDENT), maps(*TEACHER))),
    "review": (fit.ReviewFusion, fit.HCLLoss, lambda: (maps(*STUDENT), maps(*TEACHER))),
    "MGD": (fit.MGDGenerator, fit.MGDLoss, lambda: (maps((12, 4))[0], maps((24, 4))[0])),
    "KTAAD": (fit.KTAAdapter, fit.KTALoss, lambda: (maps((8, 8))[0], maps((16, 8))[0])),
    "affinity": (fit.KTAAdapter, fit.AffinityLoss, lambda: (maps((8, 8))[0], maps((16, 8))[0])),
    "FT": (fit.Translator, fit.FTLoss, lambda: (maps((8, 8))[0], maps((16, 8))[0])),
    "ViTKD": (fit.ViTKDMimic, fit.HintLoss, lambda: (tokens(8, 8), tokens(12, 12))),
}


def loss_of(module, loss, features, like, *, reduced):
    torch.manual_seed(1)  # of masks
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        adapted = module(features, like)
    goals = [goal[:, 1:] for goal in like] if isinstance(module, fit.ViTKDMimic) else like
    several = isinstance(adapted, list)
    wide = [one.float() for one in adapted] if several else adapted.float()
    if hasattr(loss, "setup") and not list(loss.parameters()):
        loss.setup(wide, goals)
    return loss(wide, goals)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_under_autocast_is_that_in_full_precision_within_one_percent(name):
    make, make_loss, features = CASES[name]
    torch.manual_seed(0)
    given, like = features()
    module, loss = make(), make_loss()
    module.setup(given, like=like)
    full = loss_of(copy.deepcopy(module), loss, given, like, reduced=False)
    reduced = loss_of(copy.deepcopy(module), loss, given, like, reduced=True)
    assert reduced.dtype == torch.float32
    assert full.item() == pytest.approx(reduced.item(), rel=0.01)
    assert full.item() != reduced.item()


@pytest.mark.parametrize("make", [fit.PADVariance, fit.SRDProjector])
def test_vectors_from_modules_under_autocast_are_close(make):
    torch.manual_seed(0)
    features = torch.randn(16, 12)
    module = make()
    module.setup(features, like=torch.randn(16, 12))
    full = copy.deepcopy(module)(features)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = module(features).float()
    assert (full - reduced).abs().mean() < 0.01 * full.abs().mean()


def test_the_paraphraser_under_autocast_is_close():
    torch.manual_seed(0)
    (features,) = maps((16, 8))
    module = fit.Paraphraser()
    module.setup(features)
    full = module(features)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = module(features)
    for key in ("factor", "reconstruction"):
        difference = (full[key] - reduced[key].float()).abs().mean()
        assert difference < 0.01 * full[key].abs().mean()


def test_srrl_and_vitkd_s_generator_under_autocast_are_close():
    torch.manual_seed(0)
    (features,), (like,) = maps((12, 4)), maps((24, 4))
    connector = fit.SRRLConnector()
    connector.setup(features, like=like)
    full = copy.deepcopy(connector)(features, like)["pooled"]
    with torch.autocast("cpu", torch.bfloat16):
        reduced = connector(features, like)["pooled"].float()
    assert (full - reduced).abs().mean() < 0.01 * full.abs().mean()
    generator, (given,), (goal,) = fit.ViTKDGenerator(), tokens(8), tokens(12)
    generator.setup(given, like=goal)
    noise = torch.rand(8, 16)
    whole = copy.deepcopy(generator)(given, goal, noise)["tokens"]
    with torch.autocast("cpu", torch.bfloat16):
        half = generator(given, goal, noise)["tokens"].float()
    assert (whole - half).abs().mean() < 0.015 * whole.abs().mean()
