"""ViTKD: reference numbers, formulas written out, masks, and the tokens of real models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill import Capture
from distill.testing import LossConformance
from distill_fitnet.vit_features import ViTKDGenerator, ViTKDLoss, ViTKDMimic

METHOD = "vitkd"


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed=0, in_channels=5, **params):
    torch.manual_seed(seed)
    return ViTKDGenerator(class_tokens=0, in_channels=in_channels, out_channels=6, **params)


def test_reference_numbers_hold(reference):
    params = reference.params
    low, high, teacher_low, teacher_high = map(
        reference.tensor, ("student_low", "student_high", "teacher_low", "teacher_high")
    )
    masking = params["lambda_vitkd"]
    mimic = ViTKDMimic(0, [6, 6], [8, 8])
    last = ViTKDGenerator(masking, 0, 6, 8).to(reference.dtype)
    for index, layer in enumerate(mimic.layers):
        reference.load(f"align2_{index}", layer)
    for name in ("align", "generation"):
        reference.load(name, getattr(last.layers[0], name))
    with torch.no_grad():
        last.layers[0].mask_token.copy_(reference.state("mask_token")["value"].flatten())
    reference.leaves["mask_token.value"] = last.layers[0].mask_token
    generated = last(high, teacher_high, noise=reference.tensor("noise"))
    assert torch.equal(generated["mask"].long(), reference.tensor("mask"))
    loss = ViTKDLoss(params["alpha_vitkd"], params["beta_vitkd"], masking, class_tokens=0)
    teacher_low = teacher_low.unbind(1)
    reference.check(
        loss(
            mimic(low.unbind(1)), teacher_low, generated["tokens"], teacher_high, generated["mask"]
        )
    )


def squares(student, teacher):
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return sum((s - t) ** 2 for s, t in pairs)


@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_loss_equals_the_formula_written_out(class_tokens):
    low, low_t = ([tokens(2, 9, 4, seed=n + i).double() for i in (0, 1, 2)] for n in (1, 5))
    high, high_t = tokens(2, 9, 6, seed=8).double(), tokens(2, 9, 6, seed=9).double()
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    expected = 0.3 * sum(squares(s, t) for s, t in zip(low, low_t, strict=True)) / 2
    for b, n in mask.nonzero().tolist():
        expected += 0.2 / 0.7 * squares(high[b, n], high_t[b, n]) / 2

    def with_class(x):
        return torch.cat([torch.full((2, class_tokens, x.shape[2]), 7.0).double(), x], 1)

    loss = ViTKDLoss(0.3, 0.2, 0.7, class_tokens)(
        low, [with_class(t) for t in low_t], high, with_class(high_t), mask
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


class TestViTKDLossOfLowLayers(LossConformance):
    student = "student_low"
    teacher = "teacher_low"

    def make(self):
        return ViTKDLoss(alpha=0.01, beta=0.02, class_tokens=0)

    def tensors(self, batch):
        given = {
            name: torch.randn(batch, 4, 3)
            for name in ("student_low", "teacher_low", "student_high", "teacher_high")
        }
        return {**given, "mask": torch.tensor([True, False, True, True]).expand(batch, 4)}


class TestViTKDLossOfTheLastLayer(TestViTKDLossOfLowLayers):
    student = "student_high"
    teacher = "teacher_high"


def test_bfloat16_is_within_one_percent():
    given = [tokens(2, 9, 4, seed=seed) for seed in range(4)]
    mask, loss = torch.arange(9).expand(2, 9) % 2 == 0, ViTKDLoss(0.3, 0.2, class_tokens=0)
    value = loss(*(x.bfloat16() for x in given), mask)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*given, mask).item(), rel=0.01)


@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_the_mimic_projects_the_patches_where_widths_differ(class_tokens):
    features = [tokens(2, 9 + class_tokens, d).double() for d in (4, 6)]
    module = ViTKDMimic(class_tokens)
    module.setup(features, [tokens(2, 10, 6), tokens(2, 10, 6)])
    linear, identity = module.layers
    assert isinstance(identity, nn.Identity)
    first, second = module(features)
    patches = [x[:, class_tokens:] for x in features]
    torch.testing.assert_close(first, patches[0] @ linear.weight.T + linear.bias)
    assert torch.equal(second, patches[1])


def generated_by_hand(module, features, noise, masking):
    """Return what the generator should give in training mode, and the mask."""
    layer = module.layers[0]
    x = (features @ layer.align.weight.T + layer.align.bias).clone()
    batch, number, width = x.shape
    mask = torch.zeros(batch, number, dtype=torch.bool)
    for b in range(batch):
        order = sorted(range(number), key=lambda n: noise[b, n].item())
        for n in order[int(number * (1 - masking)) :]:
            mask[b, n], x[b, n] = True, layer.mask_token
    side = math.isqrt(number)
    maps = torch.zeros(batch, width, side, side, dtype=x.dtype)
    for n in range(number):
        maps[:, :, n // side, n % side] = x[:, n]
    first, second = layer.generation[0], layer.generation[2]
    maps = F.conv2d(maps, first.weight, first.bias, padding=1).clamp(min=0)
    maps = F.conv2d(maps, second.weight, second.bias, padding=1)
    return torch.stack([maps[:, :, n // side, n % side] for n in range(number)], 1), mask


@pytest.mark.parametrize(("masking", "number"), [(0.5, 16), (0.3, 9), (0.9, 25)])
def test_generation_equals_the_definition_written_out(masking, number):
    module = generator(masking=masking).double()
    nn.init.normal_(module.layers[0].mask_token)
    features = tokens(2, number, 5, seed=1, dtype=torch.float64)
    noise = torch.rand(2, number, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, mask = generated_by_hand(module, features, noise, masking)
    given = module(features, noise=noise)
    assert torch.equal(given["mask"], mask)
    torch.testing.assert_close(given["tokens"], expected)


def test_each_sample_is_masked_anew_and_in_the_same_measure():
    module = generator(masking=0.75)
    torch.manual_seed(0)
    masks = [module(tokens(8, 16, 5))["mask"] for _ in range(2)]
    assert not torch.equal(*masks)
    assert len(masks[0].unique(dim=0)) > 4
    assert torch.cat(masks).sum(1).eq(12).all()


def test_in_evaluation_mode_nothing_is_masked():
    module, features = generator().eval(), tokens(2, 9, 5)
    nn.init.normal_(module.layers[0].mask_token)
    given = module(features)
    assert not given["mask"].any()
    assert torch.equal(given["tokens"], module(features)["tokens"])


def test_the_mask_token_starts_at_zero_and_learns():
    module = generator()
    assert module.layers[0].mask_token.eq(0).all()
    module(tokens(2, 9, 5))["tokens"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_setup_finds_what_the_constructor_may_be_given():
    module = ViTKDGenerator(class_tokens=0)
    torch.manual_seed(0)
    module.setup(tokens(2, 9, 5), tokens(2, 10, 6), noise=torch.zeros(2, 9))
    explicit, found = generator().state_dict(), module.state_dict()
    assert list(found) == list(explicit)
    assert all(torch.equal(found[name], explicit[name]) for name in explicit)


def test_loaded_weights_give_the_same_tokens():
    module, other, features = generator(0).eval(), generator(1).eval(), tokens(2, 9, 5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(features)["tokens"], other(features)["tokens"])


@pytest.mark.parametrize("in_channels", [5, 6])
def test_reduced_precision_tokens_are_taken(in_channels):
    module, features = generator(in_channels=in_channels).eval(), tokens(2, 9, in_channels)
    expected = module(features)["tokens"]
    given = module(features.bfloat16())["tokens"]
    torch.testing.assert_close(given, expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        given = module.train()(features.bfloat16())["tokens"]
    assert given.isfinite().all()
    mimic = ViTKDMimic(0, in_channels, 6)
    torch.testing.assert_close(
        mimic(features.bfloat16()).float(), mimic(features), rtol=0.02, atol=0.02
    )


def test_a_vit_of_torchvision_is_distilled_without_its_class_token():
    vision = pytest.importorskip("torchvision")

    def vit(width):
        return vision.models.VisionTransformer(32, 8, 3, 2, width, 2 * width, num_classes=5)

    names = [f"encoder.layers.encoder_layer_{index}" for index in (0, 1)]
    check_vitkd(vit(8), vit(12), [*names, "encoder.ln"], torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(("kind", "class_tokens"), [("", 1), ("_distilled", 2)])
def test_a_deit_of_timm_is_distilled_without_its_class_tokens(kind, class_tokens):
    timm = pytest.importorskip("timm")

    def deit(width):
        name = f"deit_tiny{kind}_patch16_224"
        return timm.create_model(name, img_size=64, depth=3, embed_dim=width, num_heads=2)

    images, names = torch.randn(2, 3, 64, 64), ["blocks.0", "blocks.1", "norm"]
    check_vitkd(deit(8), deit(12), names, images, class_tokens)


def check_vitkd(student, teacher, names, images, class_tokens=1):
    """Capture, set up, and take a step of the loss as an experiment would."""
    with Capture(student, names) as of_student, Capture(teacher, names) as of_teacher:
        with torch.no_grad():
            teacher.eval()(images)
        student(images)
        s, t = (
            [captured[name] for name in names] for captured in (of_student.pop(), of_teacher.pop())
        )
    assert s[0].shape == (2, 16 + class_tokens, 8)
    mimic, last = ViTKDMimic(class_tokens), ViTKDGenerator(class_tokens=class_tokens)
    mimic.setup(s[:2], t[:2])
    last.setup(s[2], t[2])
    given = last(s[2], t[2])
    assert given["mask"].sum(1).tolist() == [8, 8]
    loss = ViTKDLoss(class_tokens=class_tokens)
    value = loss(mimic(s[:2], t[:2]), t[:2], given["tokens"], t[2], given["mask"])
    value.backward()
    assert value.isfinite()
    blocks = [p.grad for n, p in student.named_parameters() if "head" not in n]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in blocks)


def test_what_does_not_fit_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"17 tokens \(2, 17, 6\) make no square.*class_tokens is 0"
    ):
        generator()(tokens(2, 17, 5))
    with pytest.raises(ValueError, match=r"noise for tokens \(2, 9, 6\).*\(2, 9\), got \(2, 8\)"):
        generator()(tokens(2, 9, 5), noise=torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"ViTKDMimic: features must be tokens.*\(2, 9, 4, 4\)"):
        ViTKDMimic(0).setup(torch.zeros(2, 9, 4, 4), tokens(2, 9, 4))
    with pytest.raises(ValueError, match=r"in_channels is \[5\].*\(2, 9, 4\)"):
        generator().setup(tokens(2, 9, 4), tokens(2, 9, 6))
    x, mask = tokens(2, 9, 4), torch.zeros(2, 9)
    with pytest.raises(ValueError, match=r"\(2, 9, 4\) and teacher \(2, 8, 4\).*class_tokens is 1"):
        ViTKDLoss()(x, x, x, x, mask)
    with pytest.raises(ValueError, match=r"mask \(2, 8\) does not fit tokens \(2, 9, 4\)"):
        ViTKDLoss(class_tokens=0)(x, x, x, x, mask[:, 1:])


@pytest.mark.parametrize("module", [ViTKDMimic, ViTKDGenerator])
def test_a_forward_before_setup_says_what_is_missing(module):
    with pytest.raises(RuntimeError, match=f"{module.__name__} has no layers yet"):
        module()(tokens(2, 10, 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViTKDMimic(-1), "ViTKDMimic: class_tokens must be .* >= 0, got -1"),
        (lambda: ViTKDGenerator(class_tokens=-1), "ViTKDGenerator: class_tokens .* got -1"),
        (lambda: ViTKDGenerator(0.0), r"ViTKDGenerator: masking .* got 0\.0"),
        (lambda: ViTKDGenerator(1.0), r"ViTKDGenerator: masking .* got 1\.0"),
        (lambda: ViTKDLoss(alpha=-1.0), r"ViTKDLoss: alpha must be .* got -1\.0"),
        (lambda: ViTKDLoss(beta=math.inf), "ViTKDLoss: beta .* got inf"),
        (lambda: ViTKDLoss(masking=0.0), r"ViTKDLoss: masking .* got 0\.0"),
        (lambda: ViTKDLoss(class_tokens=-1), "ViTKDLoss: class_tokens .* got -1"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()
