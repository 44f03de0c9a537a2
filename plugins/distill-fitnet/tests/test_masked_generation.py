"""MGDGenerator and MGDLoss: reference numbers, formulas written out, and what is masked when."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.masked_generation import MGDGenerator, MGDLoss

METHOD = "mgd"


def maps(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draws(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def generator(in_channels=3, out_channels=4, seed=0, **params):
    torch.manual_seed(seed)
    return MGDGenerator(in_channels=in_channels, out_channels=out_channels, **params)


def test_reference_numbers_hold(reference):
    params = reference.params
    student, teacher = map(reference.tensor, ("student_feature", "teacher_feature"))
    kind = reference.variant.removesuffix("_mask")
    module = generator(student.shape[1], teacher.shape[1], kind=kind, drop=params["lambda_mgd"])
    for name in ("align", "generation"):
        reference.load(name, getattr(module.layers[0], name))
    generated = module(student, teacher, noise=reference.tensor("noise"))
    reference.check(MGDLoss(params["alpha_mgd"])(generated, teacher))


@pytest.mark.parametrize("kind", ["channel", "spatial"])
@pytest.mark.parametrize("in_channels", [3, 4])
def test_generation_equals_the_definition_written_out(kind, in_channels):
    module = generator(in_channels, kind=kind, drop=0.4).double()
    x = features = maps(2, in_channels, 5, 3, seed=1, dtype=torch.float64)
    layer = module.layers[0]
    if in_channels == 3:
        weight, bias = layer.align.weight, layer.align.bias
        x = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]
    noise = draws(2, 4, 1, 1) if kind == "channel" else draws(2, 1, 5, 3)
    mask = torch.ones(2, 4, 5, 3, dtype=torch.float64)
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        if kind == "channel":
            mask[b, c, i, j] = float(noise[b, c, 0, 0] >= 0.4)
        else:
            mask[b, c, i, j] = float(noise[b, 0, i, j] <= 0.6)
    assert 0 < mask.mean() < 1
    first, second = layer.generation[0], layer.generation[2]
    x = F.conv2d(x * mask, first.weight, first.bias, padding=1).clamp(min=0)
    expected = F.conv2d(x, second.weight, second.bias, padding=1)
    torch.testing.assert_close(module(features, noise=noise), expected)


@pytest.mark.parametrize("kind", ["channel", "spatial"])
def test_about_as_much_is_dropped_as_asked_for_and_anew_each_time(kind):
    module = generator(4, kind=kind, drop=0.3)
    module.layers[0].generation = nn.Conv2d(4, 4, 1, bias=False)
    nn.init.dirac_(module.layers[0].generation.weight)
    torch.manual_seed(0)
    kept = [module(torch.ones(50, 4, 6, 6)).detach() for _ in range(2)]
    assert not torch.equal(*kept)
    assert torch.cat(kept).mean().item() == pytest.approx(0.7, abs=0.06)
    dims = (2, 3) if kind == "channel" else (1,)  # what is dropped together
    assert kept[0].var(dims).eq(0).all()
    assert kept[0].mean(dims).unique().tolist() == [0.0, 1.0]


def test_in_evaluation_mode_nothing_is_masked():
    module, features = generator(drop=0.9).eval(), maps(2, 3, 4, 4)
    layer = module.layers[0]
    expected = layer.generation(layer.align(features))
    assert torch.equal(module(features), expected)
    assert torch.equal(module(features, noise=torch.zeros(2, 4, 1, 1)), expected)


def test_equal_channels_are_not_aligned():
    assert isinstance(generator(4, 4).layers[0].align, nn.Identity)


def test_several_layers_come_back_as_a_list():
    features, like = [maps(2, 3, 4, 4), maps(2, 5, 2, 2)], [maps(2, 4, 4, 4), maps(2, 5, 2, 2)]
    module = MGDGenerator()
    module.setup(features, like)
    given = module(features, like, noise=[draws(2, 4, 1, 1), draws(2, 5, 1, 1)])
    assert [x.shape for x in given] == [t.shape for t in like]


def test_setup_finds_what_the_constructor_may_be_given():
    module = MGDGenerator()
    torch.manual_seed(0)
    module.setup(maps(2, 3, 4, 4), maps(2, 4, 4, 4), noise=draws(2, 4, 1, 1))
    explicit, found = generator().state_dict(), module.state_dict()
    assert list(found) == list(explicit)
    assert all(torch.equal(found[name], explicit[name]) for name in explicit)


def test_loaded_weights_give_the_same_maps():
    module, other, features = generator(seed=0).eval(), generator(seed=1).eval(), maps(2, 3, 4, 4)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(features), other(features))


def test_every_weight_gets_a_gradient():
    module = generator()
    MGDLoss()(module(maps(4, 3, 4, 4)), maps(4, 4, 4, 4, seed=1)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("in_channels", [3, 4])
def test_reduced_precision_features_are_taken(in_channels):
    module, features = generator(in_channels).eval(), maps(2, in_channels, 4, 4)
    expected = module(features)
    torch.testing.assert_close(module(features.bfloat16()), expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        given = module(features.bfloat16()).float()
    torch.testing.assert_close(given, expected, rtol=0.03, atol=0.03)


def test_loss_equals_the_formula_written_out():
    shapes = [(3, 4, 2, 5), (3, 2, 3, 3)]
    students, teachers = (
        [maps(*shape, seed=seed, dtype=torch.float64) for shape in shapes] for seed in (1, 2)
    )
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
        total += sum((s - t) ** 2 for s, t in pairs)
    assert MGDLoss(0.02)(students, teachers).item() == pytest.approx(0.02 * total / 3, rel=1e-12)


class TestMGDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return MGDLoss(alpha=0.01)

    def tensors(self, batch):
        return {
            "student_features": torch.randn(batch, 3, 4, 4),
            "teacher_features": torch.randn(batch, 3, 4, 4),
        }


def test_bfloat16_is_within_one_percent():
    student, teacher = maps(4, 6, 3, 3), maps(4, 6, 3, 3, seed=1)
    loss = MGDLoss()(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(MGDLoss()(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "shape", "wanted"),
    [("channel", (2, 3, 1, 1), r"\(2, 4, 1, 1\)"), ("spatial", (2, 4, 1, 1), r"\(2, 1, 5, 6\)")],
)
def test_noise_of_another_shape_is_refused(kind, shape, wanted):
    with pytest.raises(ValueError, match=rf"MGDGenerator: noise .*\(2, 4, 5, 6\).*{wanted}, got"):
        generator(kind=kind)(maps(2, 3, 5, 6), noise=torch.zeros(shape))


def test_what_does_not_fit_is_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"in_channels is \[3\].*\(2, 5, 4, 4\)"):
        generator().setup(maps(2, 5, 4, 4), maps(2, 4, 4, 4))
    with pytest.raises(ValueError, match=r"MGDGenerator: give out_channels.*`like`"):
        MGDGenerator().setup(maps(2, 5, 4, 4))
    message = r"student \(2, 3, 4, 4\) and teacher \(2, 3, 2, 2\).*same height and width"
    with pytest.raises(ValueError, match=message):
        MGDLoss()(maps(2, 3, 4, 4), maps(2, 3, 2, 2))


def test_a_forward_before_setup_says_what_is_missing():
    with pytest.raises(RuntimeError, match="MGDGenerator has no layers yet"):
        MGDGenerator()(maps(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MGDGenerator(kind="both"), "kind must be one of 'channel', 'spatial', got 'both'"),
        (lambda: MGDGenerator(drop=1.0), r"drop must be within \[0, 1\), got 1.0"),
        (lambda: MGDGenerator(drop=-0.1), r"drop must be within \[0, 1\), got -0.1"),
        (lambda: MGDLoss(-1.0), r"MGDLoss: alpha must be a finite number >= 0, got -1.0"),
        (lambda: MGDLoss(math.nan), "alpha .* got nan"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
