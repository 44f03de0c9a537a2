"""Factor transfer: reference numbers, formulas by hand, modules, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.testing import LossConformance
from distill_fitnet.factor_transfer import FTLoss, Paraphraser, Translator

METHOD = "ft"
POSITIONS = [f"{n}.{name}" for n in (0, 2, 4) for name in ("weight", "bias")]


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(kind, *args, **params):
    torch.manual_seed(0)
    return kind(*args, **params)


def under(prefix):
    return {name: f"{prefix}.{name}" for name in POSITIONS}


def test_equals_the_reference_numbers(reference):
    params = reference.params
    if reference.variant == "factors":
        student, teacher = reference.tensor("student_factor"), reference.tensor("teacher_factor")
        loss = FTLoss(params["p"], params["reduction"])(student, teacher)
    elif reference.variant == "channel_power":
        student, teacher = reference.tensor("student_feature"), reference.tensor("teacher_feature")
        loss = FTLoss(form="channel_power", power=params["p1"], p=params["p2"])(student, teacher)
    else:
        teacher = reference.tensor("teacher_feature")
        paraphraser = Paraphraser(rate=params["k"], batch_norm=params["uses_bn"])
        paraphraser.setup(teacher)
        reference.load("paraphraser_encoder", paraphraser, under("layers.0.encoder"))
        if reference.variant == "paraphraser":
            reference.load("paraphraser_decoder", paraphraser, under("layers.0.decoder"))
            loss = nn.MSELoss(reduction="sum")(paraphraser(teacher)["reconstruction"], teacher)
        else:
            student, factor = reference.tensor("student_feature"), paraphraser(teacher)["factor"]
            translator = Translator(batch_norm=params["uses_bn"])
            translator.setup(student, factor)
            reference.load("translator", translator, under("layers.0"))
            loss = FTLoss(params["p"], params["reduction"])(translator(student, factor), factor)
    reference.check(loss)


def unit(values):
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_equals_the_formula_written_out(p, reduction):
    student, teacher = maps(3, 2, 3, 4, seed=1), maps(3, 2, 3, 4, seed=2)
    samples = []
    for s, t in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        powers = [abs(a - b) ** p for a, b in zip(unit(s), unit(t), strict=True)]
        samples.append(sum(powers) ** (1 / p))
    expected = sum(samples)
    if reduction == "mean":
        expected /= 3 * (2 * 3 * 4 if p == 1 else 1)
    loss = FTLoss(p, reduction)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("power", "p"), [(1, 1), (2, 2), (3, 3)])
def test_channel_power_equals_the_formula_written_out(power, p, reduction):
    student, teacher = maps(2, 3, 2, 3, seed=1), maps(2, 5, 2, 3, seed=2)
    values = []
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        one, other = (
            unit([sum(v**power for v in column) / len(f) for column in zip(*f, strict=True)])
            for f in (s, t)
        )
        values += [abs(a - b) if p == 1 else (a - b) ** p for a, b in zip(one, other, strict=True)]
    expected = sum(values) / (len(values) if reduction == "mean" else 1)
    loss = FTLoss(p, reduction, "channel_power", power)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_channel_power_pools_the_larger_map_first():
    large, small = maps(2, 3, 8, 8, seed=1), maps(2, 5, 4, 4, seed=2)
    loss = FTLoss(form="channel_power")
    torch.testing.assert_close(loss(large, small), loss(F.avg_pool2d(large, 2), small))


@pytest.mark.parametrize("form", ["factors", "channel_power"])
@pytest.mark.parametrize("p", [1, 2])
def test_loss_of_bfloat16_is_near_that_of_float32(p, form):
    student, teacher = maps(4, 8, 6, 6).float(), maps(4, 8, 6, 6, seed=1).float()
    loss = FTLoss(p, form=form)
    rounded = loss(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss(student, teacher).item(), rel=0.01)


class TestFTLoss(LossConformance):
    student = "student_factor"
    teacher = "teacher_factor"

    def make(self):
        return FTLoss()

    def tensors(self, batch):
        return {name: torch.randn(batch, 3, 4, 4) for name in (self.student, self.teacher)}


class TestFTLossOfNorms(TestFTLoss):
    def make(self):
        return FTLoss(p=2)


class TestFTLossOfChannelPowers(TestFTLoss):
    def make(self):
        return FTLoss(form="channel_power")


def leaky(features):
    return torch.where(features > 0, features, 0.1 * features)


@pytest.mark.parametrize(("rate", "code"), [(0.5, 4), (0.4, 3), (1.5, 13)])
def test_paraphraser_is_three_convolutions_and_three_back(rate, code):
    features = maps(2, 9, 5, 3)
    paraphraser = Paraphraser(rate=rate)
    paraphraser.setup(features)
    weights = list(paraphraser.parameters())
    found = paraphraser(features)
    expected = features
    for layer, convolve in enumerate([F.conv2d] * 3 + [F.conv_transpose2d] * 3):
        weight, bias = weights[2 * layer : 2 * layer + 2]
        expected = leaky(convolve(expected, weight, bias, padding=1))
        if layer == 2:
            torch.testing.assert_close(found["factor"], expected)
            assert expected.shape == (2, code, 5, 3)
    torch.testing.assert_close(found["reconstruction"], expected)
    assert expected.shape == features.shape
    planes = [(9, 9), (9, code), (code, code)]
    assert [tuple(w.shape[:2])[::-1] for w in weights[:6:2]] == planes


def test_translator_turns_a_feature_into_a_factor():
    features, like = maps(2, 3, 5, 4), maps(2, 7, 5, 4)
    translator = Translator()
    translator.setup(features, like)
    weights = list(translator.parameters())
    expected = features
    for layer in range(3):
        expected = leaky(F.conv2d(expected, *weights[2 * layer : 2 * layer + 2], padding=1))
    torch.testing.assert_close(translator(features, like), expected)
    assert [tuple(w.shape[:2]) for w in weights[::2]] == [(3, 3), (7, 3), (7, 7)]


@pytest.mark.parametrize("kind", [Paraphraser, Translator])
def test_batch_norm_stands_between_convolution_and_activation(kind):
    module = kind(4, batch_norm=True) if kind is Paraphraser else kind(4, 6, batch_norm=True)
    layers = module.layers[0].encoder if kind is Paraphraser else module.layers[0]
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 3
    assert [type(layer) for layer in layers] == kinds


@pytest.mark.parametrize("batch_norm", [False, True])
def test_given_channels_make_the_same_modules_as_channels_found(batch_norm):
    features, factor = maps(2, 6, 4, 4).float(), maps(2, 3, 4, 4).float()
    found = seeded(Paraphraser, batch_norm=batch_norm)
    found.setup(features)
    explicit = seeded(Paraphraser, 6, batch_norm=batch_norm)
    torch.testing.assert_close(explicit(features), found(features), rtol=0, atol=0)
    translator = seeded(Translator, batch_norm=batch_norm)
    translator.setup(features, factor)
    explicit = seeded(Translator, 6, 3, batch_norm=batch_norm)
    explicit.setup(features)
    torch.testing.assert_close(explicit(features), translator(features), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Paraphraser, Translator])
def test_state_of_one_module_makes_another_the_same(kind):
    features = maps(2, 6, 4, 4).float()
    first, second = (kind(6) if kind is Paraphraser else kind(6, 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(features), first(features), rtol=0, atol=0)


@pytest.mark.parametrize("module", [Paraphraser(), Translator()])
def test_half_precision_features_are_taken(module):
    features = maps(2, 6, 4, 4).bfloat16()
    if isinstance(module, Translator):
        module.setup(features, features)
        assert module(features).dtype == torch.float32
    else:
        module.setup(features)
        assert module(features)["factor"].dtype == torch.float32


@pytest.mark.parametrize("module", [Paraphraser(), Translator(in_channels=6)])
def test_modules_without_shapes_say_that_they_have_none(module):
    with pytest.raises(RuntimeError, match=r"has no layers yet: call setup"):
        module(maps(2, 6, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FTLoss(p=0.5), r"FTLoss: p must be a finite number >= 1, got 0\.5"),
        (lambda: FTLoss(p=1.5, form="channel_power"), r"FTLoss: p must be whole, .* got 1\.5"),
        (lambda: FTLoss(power=1.5), r"FTLoss: power must be whole, .* got 1\.5"),
        (lambda: FTLoss(reduction="none"), r"FTLoss: reduction must be one of 'mean', 'sum', got"),
        (lambda: FTLoss(form="at"), r"FTLoss: form must be one of 'factors', 'channel_power', got"),
        (lambda: Paraphraser(rate=0.0), r"Paraphraser: rate must be a finite number > 0, got 0\.0"),
        (lambda: Paraphraser(4, rate=0.2), r"rate must be at least 1 / 4, .* got 0\.2"),
        (lambda: Paraphraser(0), r"Paraphraser: in_channels must be a whole number >= 1, .* got 0"),
        (lambda: Translator(4, -1), r"Translator: out_channels must be .* got -1"),
    ],
)
def test_a_parameter_out_of_range_is_named_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_features_that_do_not_fit_the_modules_are_refused():
    with pytest.raises(ValueError, match=r"Paraphraser: in_channels is \[5\].*4\) have \[6\]"):
        Paraphraser(5).setup(maps(2, 6, 4, 4))
    with pytest.raises(ValueError, match=r"Translator: out_channels is \[5\].*4\) have \[6\]"):
        Translator(6, 5).setup(maps(2, 6, 4, 4), maps(2, 6, 4, 4))
    with pytest.raises(ValueError, match=r"Translator: give out_channels, or wire"):
        Translator().setup(maps(2, 6, 4, 4))
    with pytest.raises(ValueError, match=r"Translator: features must be maps .* got \(2, 6\)"):
        Translator().setup(maps(2, 6, 4, 4), maps(2, 6))
    with pytest.raises(ValueError, match=r"Paraphraser: features must be of one layer, got a list"):
        Paraphraser().setup([maps(2, 6, 4, 4)])


def test_factors_of_different_shapes_are_refused():
    message = r"FTLoss: .*\(2, 3, 4, 4\) and teacher \(2, 3, 2, 2\) .* pick layers"
    with pytest.raises(ValueError, match=message):
        FTLoss()(maps(2, 3, 4, 4), maps(2, 3, 2, 2))
