"""The CIFAR networks: names and shapes of parameters, counts, features, behaviour.

Names and shapes are written down here a second time, as the published code of RepDistiller
(ResNet, WRN, VGG, MobileNetV2, ShuffleNets) and bearpaw/pytorch-classification (DenseNet) gives
them. No checkpoint is loaded.
"""

import math
import re

import pytest
import torch
import torchvision.models as tv
from torch import nn

from distill.model.capture import Capture
from distill.signature import bind
from distill_datasets_vision import distill_models
from distill_datasets_vision.cifar import cifar_models
from distill_datasets_vision.cifar.densenet import DenseLayer
from distill_datasets_vision.cifar.mobilenet import InvertedResidual
from distill_datasets_vision.cifar.resnet import BasicBlock, Bottleneck
from distill_datasets_vision.cifar.shufflenet import ChannelShuffle, ShuffleUnit, SplitUnit
from distill_datasets_vision.cifar.wide_resnet import WideBlock

MODELS = cifar_models()
ONE_OF_EACH_FAMILY = [
    "cifar_resnet8",
    "cifar_resnet18",
    "cifar_wrn_16_1",
    "cifar_vgg8",
    "cifar_mobilenet_v2_half",
    "cifar_shufflenet_v1",
    "cifar_shufflenet_v2",
    "cifar_densenet_bc_40_12",
]


def on_meta(name, **params):
    with torch.device("meta"):
        return MODELS[name](**params)


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def count(name, num_classes):
    return sum(p.numel() for p in on_meta(name, num_classes=num_classes).parameters())


# Expected names and shapes.


def conv(key, inputs, outputs, size, groups=1, bias=False):
    weight = {f"{key}.weight": (outputs, inputs // groups, size, size)}
    return {**weight, f"{key}.bias": (outputs,)} if bias else weight


def norm(key, width):
    values = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
    return {f"{key}.{name}": shape for name, shape in {**values, "num_batches_tracked": ()}.items()}


def linear(key, inputs, outputs):
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def resnet(blocks, widths):
    state = {**conv("conv1", 3, widths[0], 3), **norm("bn1", widths[0])}
    inputs = widths[0]
    for stage, width in enumerate(widths[1:], 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            state |= conv(f"{at}.conv1", inputs, width, 3) | norm(f"{at}.bn1", width)
            state |= conv(f"{at}.conv2", width, width, 3) | norm(f"{at}.bn2", width)
            if inputs != width:
                state |= conv(f"{at}.downsample.0", inputs, width, 1)
                state |= norm(f"{at}.downsample.1", width)
            inputs = width
    return state | linear("fc", inputs, 100)


def wide_resnet(blocks, widening):
    state, inputs = conv("conv1", 3, 16, 3), 16
    for stage, width in enumerate((16 * widening, 32 * widening, 64 * widening), 1):
        for block in range(blocks):
            at = f"block{stage}.layer.{block}"
            state |= norm(f"{at}.bn1", inputs) | conv(f"{at}.conv1", inputs, width, 3)
            state |= norm(f"{at}.bn2", width) | conv(f"{at}.conv2", width, width, 3)
            if inputs != width:
                state |= conv(f"{at}.convShortcut", inputs, width, 1)
            inputs = width
    return state | norm("bn1", inputs) | linear("fc", inputs, 100)


def vgg(*convolutions):
    state, inputs = {}, 3
    for block, (number, width) in enumerate(
        zip(convolutions, (64, 128, 256, 512, 512), strict=True)
    ):
        for index in range(number):
            state |= conv(f"block{block}.{3 * index}", inputs, width, 3, bias=True)
            state |= norm(f"block{block}.{3 * index + 1}", width)
            inputs = width
    return state | linear("classifier", 512, 100)


def mobilenet(width):
    channels = [int(width * c) for c in (32, 16, 24, 32, 64, 96, 160, 320)]
    state = conv("conv1.0", 3, channels[0], 3) | norm("conv1.1", channels[0])
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for block in range(blocks):
            inputs, outputs = channels[stage if block == 0 else stage + 1], channels[stage + 1]
            inner = inputs * (6 if stage else 1)
            at = f"blocks.{stage}.{block}.conv"
            state |= conv(f"{at}.0", inputs, inner, 1) | norm(f"{at}.1", inner)
            state |= conv(f"{at}.3", inner, inner, 3, groups=inner) | norm(f"{at}.4", inner)
            state |= conv(f"{at}.6", inner, outputs, 1) | norm(f"{at}.7", outputs)
    state |= conv("conv2.0", channels[-1], 1280, 1) | norm("conv2.1", 1280)
    return state | linear("classifier.0", 1280, 100)


def shufflenet_v1():
    state = conv("conv1", 3, 24, 1) | norm("bn1", 24)
    inputs = 24
    for stage, (width, units) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        for unit in range(units):
            at = f"layer{stage}.{unit}"
            outputs = width - inputs if unit == 0 else width
            inner = outputs // 4
            state |= conv(f"{at}.conv1", inputs, inner, 1, groups=1 if inputs == 24 else 3)
            state |= norm(f"{at}.bn1", inner) | conv(f"{at}.conv2", inner, inner, 3, groups=inner)
            state |= norm(f"{at}.bn2", inner) | conv(f"{at}.conv3", inner, outputs, 1, groups=3)
            state |= norm(f"{at}.bn3", outputs)
            inputs = width
    return state | linear("linear", 960, 100)


def shufflenet_v2():
    state = conv("conv1", 3, 24, 1) | norm("bn1", 24)
    inputs = 24
    for stage, (width, units) in enumerate(((116, 4), (232, 8), (464, 4)), 1):
        half, at = width // 2, f"layer{stage}.0"
        state |= conv(f"{at}.conv1", inputs, inputs, 3, groups=inputs) | norm(f"{at}.bn1", inputs)
        state |= conv(f"{at}.conv2", inputs, half, 1) | norm(f"{at}.bn2", half)
        state |= conv(f"{at}.conv3", inputs, half, 1) | norm(f"{at}.bn3", half)
        state |= conv(f"{at}.conv4", half, half, 3, groups=half) | norm(f"{at}.bn4", half)
        state |= conv(f"{at}.conv5", half, half, 1) | norm(f"{at}.bn5", half)
        for unit in range(1, units):
            at = f"layer{stage}.{unit}"
            state |= conv(f"{at}.conv1", half, half, 1) | norm(f"{at}.bn1", half)
            state |= conv(f"{at}.conv2", half, half, 3, groups=half) | norm(f"{at}.bn2", half)
            state |= conv(f"{at}.conv3", half, half, 1) | norm(f"{at}.bn3", half)
        inputs = width
    return state | conv("conv2", 464, 1024, 1) | norm("bn2", 1024) | linear("linear", 1024, 100)


def densenet(depth, growth):
    width = 2 * growth
    state = conv("conv1", 3, width, 3)
    for block in (1, 2, 3):
        for layer in range((depth - 4) // 6):
            at = f"dense{block}.{layer}"
            state |= norm(f"{at}.bn1", width) | conv(f"{at}.conv1", width, 4 * growth, 1)
            state |= norm(f"{at}.bn2", 4 * growth) | conv(f"{at}.conv2", 4 * growth, growth, 3)
            width += growth
        if block < 3:
            state |= norm(f"trans{block}.bn1", width)
            state |= conv(f"trans{block}.conv1", width, width // 2, 1)
            width //= 2
    return state | norm("bn", width) | linear("fc", width, 100)


def four_stage_resnet(build):
    state = shapes(build(num_classes=100))
    return {**state, "conv1.weight": (64, 3, 3, 3)}


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
EXPECTED = {
    "cifar_resnet8": lambda: resnet(1, NARROW),
    "cifar_resnet14": lambda: resnet(2, NARROW),
    "cifar_resnet20": lambda: resnet(3, NARROW),
    "cifar_resnet32": lambda: resnet(5, NARROW),
    "cifar_resnet44": lambda: resnet(7, NARROW),
    "cifar_resnet56": lambda: resnet(9, NARROW),
    "cifar_resnet110": lambda: resnet(18, NARROW),
    "cifar_resnet8x4": lambda: resnet(1, WIDE),
    "cifar_resnet32x4": lambda: resnet(5, WIDE),
    "cifar_resnet18": lambda: four_stage_resnet(tv.resnet18),
    "cifar_resnet34": lambda: four_stage_resnet(tv.resnet34),
    "cifar_resnet50": lambda: four_stage_resnet(tv.resnet50),
    "cifar_wrn_16_1": lambda: wide_resnet(2, 1),
    "cifar_wrn_16_2": lambda: wide_resnet(2, 2),
    "cifar_wrn_28_2": lambda: wide_resnet(4, 2),
    "cifar_wrn_28_10": lambda: wide_resnet(4, 10),
    "cifar_wrn_40_1": lambda: wide_resnet(6, 1),
    "cifar_wrn_40_2": lambda: wide_resnet(6, 2),
    "cifar_vgg8": lambda: vgg(1, 1, 1, 1, 1),
    "cifar_vgg11": lambda: vgg(1, 1, 2, 2, 2),
    "cifar_vgg13": lambda: vgg(2, 2, 2, 2, 2),
    "cifar_vgg16": lambda: vgg(2, 2, 3, 3, 3),
    "cifar_vgg19": lambda: vgg(2, 2, 4, 4, 4),
    "cifar_mobilenet_v2": lambda: mobilenet(1.0),
    "cifar_mobilenet_v2_half": lambda: mobilenet(0.5),
    "cifar_shufflenet_v1": shufflenet_v1,
    "cifar_shufflenet_v2": shufflenet_v2,
    "cifar_densenet_bc_40_12": lambda: densenet(40, 12),
    "cifar_densenet_bc_100_12": lambda: densenet(100, 12),
    "cifar_densenet_bc_190_40": lambda: densenet(190, 40),
    "cifar_densenet_bc_250_24": lambda: densenet(250, 24),
}


def test_every_network_is_offered_and_has_its_expected_state_here():
    assert set(EXPECTED) == set(MODELS) == {n for n in distill_models() if n.startswith("cifar_")}


@pytest.mark.parametrize("name", EXPECTED)
def test_parameters_and_buffers_have_the_published_names_and_shapes(name):
    with torch.device("meta"):
        expected = EXPECTED[name]()
    assert shapes(on_meta(name)) == expected


# Numbers of parameters.


def resnet_count(blocks, widths, num_classes):
    """He et al. 2016, section 4.2: 2n layers of each width, all but the first of equal width."""
    stem, *stages = widths
    total, inputs = 27 * stem + 2 * stem, stem
    for width in stages:
        total += 9 * inputs * width + (2 * blocks - 1) * 9 * width**2 + 2 * blocks * 2 * width
        total += inputs * width + 2 * width if inputs != width else 0
        inputs = width
    return total + (inputs + 1) * num_classes


def wide_resnet_count(blocks, k, num_classes):
    """Zagoruyko and Komodakis 2016, table 1, with batch norm in front of each convolution."""
    total, inputs = 27 * 16, 16
    for width in (16 * k, 32 * k, 64 * k):
        total += 9 * inputs * width + (2 * blocks - 1) * 9 * width**2
        total += 2 * inputs + 2 * width * (2 * blocks - 1)
        total += inputs * width if inputs != width else 0
        inputs = width
    return total + 2 * inputs + (inputs + 1) * num_classes


def densenet_count(depth, k, num_classes):
    """Huang et al. 2017, section 3: layer l of a block sees c + (l - 1)k channels, summed up."""
    n, channels = (depth - 4) // 6, 2 * k
    total = 27 * channels
    for block in range(3):
        seen = n * channels + k * n * (n - 1) // 2
        total += seen * (4 * k + 2) + n * (2 * 4 * k + 9 * 4 * k * k)
        channels += n * k
        if block < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    return total + 2 * channels + (channels + 1) * num_classes


def vgg_count(convolutions, num_classes):
    total, inputs = 0, 3
    for number, width in zip(convolutions, (64, 128, 256, 512, 512), strict=True):
        total += 9 * inputs * width + (number - 1) * 9 * width**2 + number * 3 * width
        inputs = width
    return total + 513 * num_classes


@pytest.mark.parametrize("num_classes", [10, 100])
def test_counts_follow_the_papers_formulas(num_classes):
    for name, blocks in {"8": 1, "20": 3, "32": 5, "44": 7, "56": 9, "110": 18}.items():
        assert count(f"cifar_resnet{name}", num_classes) == resnet_count(
            blocks, NARROW, num_classes
        )
    for name, blocks in {"8x4": 1, "32x4": 5}.items():
        assert count(f"cifar_resnet{name}", num_classes) == resnet_count(blocks, WIDE, num_classes)
    for depth, k in ((16, 1), (16, 2), (28, 2), (28, 10), (40, 1), (40, 2)):
        expected = wide_resnet_count((depth - 4) // 6, k, num_classes)
        assert count(f"cifar_wrn_{depth}_{k}", num_classes) == expected
    for depth, k in ((40, 12), (100, 12), (190, 40), (250, 24)):
        expected = densenet_count(depth, k, num_classes)
        assert count(f"cifar_densenet_bc_{depth}_{k}", num_classes) == expected
    for name, convolutions in {"8": (1, 1, 1, 1, 1), "16": (2, 2, 3, 3, 3)}.items():
        assert count(f"cifar_vgg{name}", num_classes) == vgg_count(convolutions, num_classes)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_without_convolutions_in_the_shortcuts_resnets_have_the_papers_counts(depth, millions):
    shortcuts = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    published = count(f"cifar_resnet{depth}", 10) - shortcuts
    assert round(published / 1e6, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [
        # Zagoruyko and Komodakis 2016
        ("cifar_wrn_16_2", 10, 0.7),
        ("cifar_wrn_28_10", 10, 36.5),
        ("cifar_wrn_40_1", 10, 0.6),
        ("cifar_wrn_40_2", 10, 2.2),
        # Huang et al. 2017, table 2
        ("cifar_densenet_bc_100_12", 10, 0.8),
        ("cifar_densenet_bc_190_40", 10, 25.6),
        ("cifar_densenet_bc_250_24", 10, 15.3),
        # bearpaw/pytorch-classification
        ("cifar_wrn_28_10", 10, 36.48),
        ("cifar_densenet_bc_100_12", 10, 0.77),
        ("cifar_densenet_bc_190_40", 10, 25.62),
        # as the distillation literature gives them for CIFAR-100
        ("cifar_resnet8x4", 100, 1.23),
        ("cifar_resnet20", 100, 0.28),
        ("cifar_resnet32x4", 100, 7.43),
        ("cifar_resnet50", 100, 23.71),
        ("cifar_resnet56", 100, 0.86),
        ("cifar_wrn_16_2", 100, 0.70),
        ("cifar_wrn_40_1", 100, 0.57),
        ("cifar_wrn_40_2", 100, 2.26),
        ("cifar_vgg8", 100, 3.97),  # often cut off to 3.96
        ("cifar_vgg13", 100, 9.46),
        ("cifar_mobilenet_v2_half", 100, 0.81),
        ("cifar_shufflenet_v1", 100, 0.95),
        ("cifar_shufflenet_v2", 100, 1.36),
    ],
)
def test_counts_are_the_published_ones(name, num_classes, millions):
    digits = len(str(millions).partition(".")[2])
    assert round(count(name, num_classes) / 1e6, digits) == millions


@pytest.mark.parametrize("name", MODELS)
def test_docstrings_give_the_count_for_100_classes(name):
    stated = re.search(r"([\d.]+) million parameters", MODELS[name].__doc__)
    assert stated[1] == f"{count(name, 100) / 1e6:.2f}"


# Features.

CAPTURED = {
    "cifar_resnet20": {
        "relu": (16, 32, 32),
        "layer1": (16, 32, 32),
        "layer2": (32, 16, 16),
        "layer3": (64, 8, 8),
        "layer1.2.relu2:input": (16, 32, 32),
        "flatten": (64,),
        "fc": (100,),
    },
    "cifar_resnet32x4": {
        "relu": (32, 32, 32),
        "layer1": (64, 32, 32),
        "layer2": (128, 16, 16),
        "layer3": (256, 8, 8),
        "layer3.4.relu2:input": (256, 8, 8),
        "flatten": (256,),
    },
    "cifar_resnet18": {
        "relu": (64, 32, 32),
        "layer1": (64, 32, 32),
        "layer2": (128, 16, 16),
        "layer3": (256, 8, 8),
        "layer4": (512, 4, 4),
        "flatten": (512,),
        "fc": (100,),
    },
    "cifar_resnet50": {
        "layer1": (256, 32, 32),
        "layer2": (512, 16, 16),
        "layer3": (1024, 8, 8),
        "layer4": (2048, 4, 4),
        "layer4.2.relu3:input": (2048, 4, 4),
        "flatten": (2048,),
    },
    "cifar_wrn_40_2": {
        "conv1": (16, 32, 32),
        "block1": (32, 32, 32),
        "block2": (64, 16, 16),
        "block3": (128, 8, 8),
        "block2.layer.0.bn1": (32, 32, 32),
        "block3.layer.0.relu1": (64, 16, 16),
        "relu": (128, 8, 8),
        "flatten": (128,),
        "fc": (100,),
    },
    "cifar_vgg13": {
        "block0": (64, 32, 32),
        "block1": (128, 16, 16),
        "block2": (256, 8, 8),
        "block3": (512, 4, 4),
        "block4": (512, 4, 4),
        "relu0": (64, 32, 32),
        "relu4": (512, 4, 4),
        "flatten": (512,),
        "classifier": (100,),
    },
    "cifar_mobilenet_v2_half": {
        "conv1": (16, 16, 16),
        "blocks.0": (8, 16, 16),
        "blocks.1": (12, 16, 16),
        "blocks.2": (16, 8, 8),
        "blocks.3": (32, 4, 4),
        "blocks.4": (48, 4, 4),
        "blocks.5": (80, 2, 2),
        "blocks.6": (160, 2, 2),
        "conv2": (1280, 2, 2),
        "flatten": (1280,),
        "classifier": (100,),
    },
    "cifar_shufflenet_v1": {
        "relu": (24, 32, 32),
        "layer1": (240, 16, 16),
        "layer2": (480, 8, 8),
        "layer3": (960, 4, 4),
        "layer1.3.relu3:input": (240, 16, 16),
        "layer2.7.relu3:input": (480, 8, 8),
        "layer3.3.relu3:input": (960, 4, 4),
        "flatten": (960,),
        "linear": (100,),
    },
    "cifar_shufflenet_v2": {
        "relu": (24, 32, 32),
        "layer1": (116, 16, 16),
        "layer2": (232, 8, 8),
        "layer3": (464, 4, 4),
        "relu2": (1024, 4, 4),
        "flatten": (1024,),
        "linear": (100,),
    },
    "cifar_densenet_bc_100_12": {
        "conv1": (24, 32, 32),
        "dense1": (216, 32, 32),
        "trans1": (108, 16, 16),
        "dense2": (300, 16, 16),
        "trans2": (150, 8, 8),
        "dense3": (342, 8, 8),
        "relu": (342, 8, 8),
        "flatten": (342,),
        "fc": (100,),
    },
}


@pytest.mark.parametrize("name", CAPTURED)
def test_features_of_32x32_images_have_the_shapes_that_the_docstrings_say(name):
    model = on_meta(name)
    with Capture(model, CAPTURED[name]) as capture:
        model(torch.empty(2, 3, 32, 32, device="meta"))
        features = capture.pop()
    assert {path: tuple(value.shape[1:]) for path, value in features.items()} == CAPTURED[name]


@pytest.mark.parametrize("name", MODELS)
def test_images_become_logits(name):
    model = on_meta(name, num_classes=7)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_no_activation_works_in_place_and_each_runs_once(name):
    model = on_meta(name)
    activations = {n: m for n, m in model.named_modules() if isinstance(m, nn.ReLU)}
    assert activations
    assert not any(activation.inplace for activation in activations.values())
    with Capture(model, [f"{path}:input" for path in activations]) as capture:
        model(torch.empty(2, 3, 32, 32, device="meta"))
        capture.pop()


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("cifar_resnet8", "layer2.0.relu2:input", "layer2"),
        ("cifar_resnet18", "layer1.1.relu2:input", "layer1"),
        ("cifar_wrn_16_1", "block2.layer.0.bn1", "block2.layer.0.relu1"),
        ("cifar_vgg8", "block2", "relu2"),
        ("cifar_shufflenet_v1", "layer3.3.relu3:input", "layer3"),
    ],
)
def test_features_are_captured_before_and_after_their_activation(name, before, after):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with Capture(model, [before, after]) as capture, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        features = capture.pop()
    assert (features[before] < 0).any()
    assert torch.equal(features[after], features[before].clamp(min=0))


# Behaviour.


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet34", "cifar_resnet50"])
def test_four_stages_compute_what_torchvisions_network_does_behind_its_stem(name):
    torch.manual_seed(0)
    theirs = getattr(tv, name.removeprefix("cifar_"))(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    ours = MODELS[name](num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name](num_classes=10)
    nn.functional.cross_entropy(
        model(torch.randn(4, 3, 32, 32)), torch.tensor([1, 2, 3, 4])
    ).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_residual_block_that_adds_nothing_is_its_shortcut(block):
    unit = block(4 * block.expansion, 4).eval()
    last = unit.bn3 if block is Bottleneck else unit.bn2
    nn.init.zeros_(last.weight)
    features = torch.randn(2, 4 * block.expansion, 6, 6)
    assert torch.equal(unit(features), features.clamp(min=0))


def test_a_wide_block_adds_its_input_as_it_came():
    block = WideBlock(4, 4, 1, 0.0).eval()
    nn.init.zeros_(block.conv2.weight)
    features = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(features), features)


def test_a_wide_block_of_another_shape_adds_the_activated_input_convolved():
    block = WideBlock(4, 8, 2, 0.0).eval()
    nn.init.zeros_(block.conv2.weight)
    features = torch.randn(2, 4, 6, 6)
    expected = block.convShortcut(block.bn1(features).clamp(min=0))
    torch.testing.assert_close(block(features), expected)


def test_an_inverted_residual_adds_its_input_where_shapes_agree_and_is_not_activated():
    features = torch.randn(2, 4, 6, 6)
    adding = InvertedResidual(4, 4, 1, 6)
    torch.testing.assert_close(adding(features), features + adding.conv(features))
    for outputs, stride in ((8, 1), (4, 2)):
        unit = InvertedResidual(4, outputs, stride, 6)
        assert torch.equal(unit(features), unit.conv(features))
        assert (unit(features) < 0).any()


def test_a_dense_layer_leaves_what_came_in_and_appends_the_growth():
    layer = DenseLayer(6, 3, 0.0)
    features = torch.randn(2, 6, 4, 4)
    grown = layer(features)
    assert grown.shape == (2, 9, 4, 4)
    assert torch.equal(grown[:, :6], features)


def test_channels_are_shuffled_across_groups():
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert ChannelShuffle(2)(channels).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert ChannelShuffle(3)(channels).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(ChannelShuffle(1)(channels), channels)


def test_a_split_unit_lets_the_first_half_pass_to_the_even_channels():
    features = torch.randn(2, 8, 4, 4)
    shuffled = SplitUnit(8)(features)
    assert torch.equal(shuffled[:, ::2], features[:, :4])
    assert (shuffled[:, 1::2] >= 0).all()


def test_a_shuffle_unit_appends_the_averaged_input_where_it_halves_the_resolution():
    unit = ShuffleUnit(6, 18, 2, (1, 3))
    features = torch.rand(2, 6, 4, 4)
    joined = unit(features)
    assert joined.shape == (2, 18, 2, 2)
    assert torch.equal(joined[:, 12:], nn.functional.avg_pool2d(features, 3, 2, padding=1))


@pytest.mark.parametrize("name", ["cifar_wrn_16_1", "cifar_densenet_bc_40_12"])
def test_dropout_acts_in_training_only(name):
    torch.manual_seed(0)
    plain, dropping = MODELS[name](), MODELS[name](dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(dropping(images), plain(images))
        dropping.load_state_dict(plain.state_dict())
        assert torch.equal(dropping.eval()(images), plain.eval()(images))


@pytest.mark.parametrize(
    "name", [n for n in ONE_OF_EACH_FAMILY if "shufflenet" not in n] + ["cifar_wrn_16_2"]
)
def test_convolutions_start_with_the_deviation_of_the_literature(name):
    torch.manual_seed(0)
    convolutions = [
        m for m in MODELS[name]().modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000
    ]
    assert convolutions
    for module in convolutions:
        expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
        assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
        assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_network_on_meta_has_the_modules_of_the_real_one(name):
    real, meta = MODELS[name](), on_meta(name)
    assert [n for n, _ in meta.named_modules()] == [n for n, _ in real.named_modules()]
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_parameters_from_a_file_are_checked(name):
    assert not bind(MODELS[name], {}).problems
    assert not bind(MODELS[name], {"num_classes": 10}).problems
    assert [p.key for p in bind(MODELS[name], {"num_classes": "ten"}).problems] == ["num_classes"]
    assert [p.key for p in bind(MODELS[name], {"classes": 10}).problems] == ["classes"]
