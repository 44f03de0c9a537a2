"""HNDLoss and bottlenecked: reference numbers, shapes for every image size, what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from distill.testing import LossConformance
from distill_fitnet.head_distillation import HNDLoss, bottlenecked

METHOD = "hnd"
RESNET_HEAD = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equals_the_reference_numbers(reference):
    params = reference.params
    layers = range(len(params["weights"]))
    students = [reference.tensor(f"student_feature_{n}") for n in layers]
    teachers = [reference.tensor(f"teacher_feature_{n}") for n in layers]
    reference.check(HNDLoss(params["reduction"], params["weights"])(students, teachers))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 0.0]])
def test_equals_the_formula_written_out(weights, reduction):
    shapes = [(2, 3, 4, 4), (2, 5, 2, 3), (2, 6)]
    students = [maps(*shape, seed=n) for n, shape in enumerate(shapes)]
    teachers = [maps(*shape, seed=n + 9) for n, shape in enumerate(shapes)]
    expected = 0.0
    for student, teacher, w in zip(students, teachers, weights or [1] * 3, strict=True):
        values = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
        error = sum((s - t) ** 2 for s, t in values)
        expected += w * error / (student.numel() if reduction == "mean" else 1)
    loss = HNDLoss(reduction, weights)(students, teachers)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


class TestHNDLoss(LossConformance):
    student = "student_features"
    teacher = "teacher_features"

    def make(self):
        return HNDLoss(reduction="mean")

    def tensors(self, batch):
        return {name: torch.randn(batch, 3, 4, 4) for name in (self.student, self.teacher)}


def test_loss_of_bfloat16_is_near_that_of_float32():
    student, teacher = maps(4, 8, 6, 6).float(), maps(4, 8, 6, 6, seed=1).float()
    rounded = HNDLoss()(student.bfloat16(), teacher.bfloat16())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(HNDLoss()(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"reduction": "paper"}, r"HNDLoss: reduction must be one of 'sum', 'mean', got 'paper'"),
        ({"layer_weights": [math.inf]}, r"HNDLoss: layer_weights must be finite numbers >= 0"),
    ],
)
def test_a_parameter_of_the_loss_out_of_range_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        HNDLoss(**params)


def convolution(inputs, outputs, kernel=3, stride=1, padding=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def digits_net():
    """Return a net built as those for digits: two blocks, each with max pooling behind it."""
    return nn.Sequential(
        convolution(1, 4), nn.MaxPool2d(2), convolution(4, 8), nn.MaxPool2d(2), nn.Conv2d(8, 3, 1)
    )


def after(model, replace, images):
    """Return what the replaced modules give for images."""
    for path in replace:
        images = model.get_submodule(path)(images)
    return images


def assert_same_shapes(model, replace, channels, sizes):
    changed = bottlenecked(copy.deepcopy(model).eval(), replace, channels, hidden=4)
    for size in sizes:
        images = torch.zeros(1, channels_of(model), *size)
        expected = after(model.eval(), replace, images).shape
        assert after(changed, replace, images).shape == expected, size


def channels_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


@pytest.fixture(scope="module")
def resnet():
    # Imported here, for that takes seconds.
    vision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    return vision.models.resnet18().eval()


def test_a_resnets_head_is_replaced_for_every_size_of_image(resnet):
    sizes = [(64, 64), (65, 96), (70, 67), (33, 57), (224, 97)]
    assert_same_shapes(resnet, RESNET_HEAD, 3, sizes)


def test_a_digits_nets_blocks_are_replaced_for_every_size_of_image():
    replace = ["0", "1", "2", "3"]
    assert_same_shapes(digits_net(), replace, 2, [(8, 8), (9, 9), (10, 13), (11, 15), (28, 7)])


LAYERS = {
    "same": [convolution(3, 4)],
    "valid": [convolution(3, 4, 5, 1, 0), convolution(4, 4, 3, 1, 0)],
    "valid with stride": [convolution(3, 4, 3, 2, 0), convolution(4, 4, 3, 1, 0), nn.MaxPool2d(3)],
    "padded": [convolution(3, 4, 3, 1, 3), convolution(4, 4, 1, 1, 2)],
    "stride 3": [convolution(3, 4, 3, 3, 0)],
    "stride 6 and more": [convolution(3, 4, 5, 3, 2), nn.MaxPool2d(2), nn.MaxPool2d(2)],
    "patches": [nn.Conv2d(3, 4, 16, 16)],
    "rounded up": [convolution(3, 4), nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2)],
    "two strides": [nn.Conv2d(3, 4, 3, (2, 1), 1), nn.Conv2d(4, 4, (3, 5), (1, 3), 0)],
    "one dimension": [nn.Conv2d(3, 4, 3, (1, 4), 1)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_any_row_of_convolutions_and_poolings_is_replaced_for_every_size(name):
    model = nn.Sequential(*copy.deepcopy(LAYERS[name]))
    replace = [str(n) for n in range(len(model))]
    assert_same_shapes(model, replace, 2, [(h, h + 3) for h in range(32, 50)])


def test_the_bottleneck_has_the_channels_asked_for_and_sees_every_pixel(resnet):
    model = bottlenecked(copy.deepcopy(resnet), RESNET_HEAD, channels=3, hidden=6)
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    code = model.conv1.encoder(images)
    assert code.shape == (1, 3, 8, 8)
    assert model.conv1(images).shape == (1, 128, 8, 8)
    code.square().sum().backward()
    assert (images.grad != 0).all()
    widths = [m.out_channels for m in model.conv1.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [6, 6, 6, 3, 6, 128]


def test_the_tail_keeps_its_weights_and_the_whole_runs(resnet):
    model = copy.deepcopy(resnet)
    changed = bottlenecked(model, RESNET_HEAD, channels=4)
    assert changed is model
    assert changed(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    kept = {n: v for n, v in resnet.state_dict().items() if n.split(".")[0] not in RESNET_HEAD}
    for name, value in kept.items():
        assert torch.equal(changed.state_dict()[name], value), name
    replaced = [getattr(changed, name) for name in RESNET_HEAD[1:]]
    assert all(isinstance(module, nn.Identity) for module in replaced)


def test_modules_inside_others_are_replaced():
    model = nn.ModuleDict({"stem": digits_net()})
    bottlenecked(model, ["stem.0", "stem.1"], channels=2)
    assert isinstance(model["stem"][1], nn.Identity)
    assert model["stem"](torch.zeros(2, 1, 8, 8)).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_the_model_changes_neither_statistics_nor_mode(training):
    model = digits_net().train(training)
    model[2][1].eval()  # a frozen batch norm in the replaced part
    head, untouched = [model[n] for n in range(4)], copy.deepcopy(model)
    bottlenecked(model, ["0", "1", "2", "3"], channels=2)
    assert [m.training for m in nn.Sequential(*head).modules()][1:] == [
        m.training for m in untouched[:4].modules()
    ][1:]
    for module, before in zip(head, untouched, strict=False):
        for name, value in module.state_dict().items():
            assert torch.equal(value, before.state_dict()[name])
    assert all(module.training == training for module in model[0].modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bottleneck_is_where_the_model_is(dtype):
    model = bottlenecked(digits_net().to("meta", dtype), ["0", "1"], channels=2)
    parameters = list(model[0].parameters())
    assert {(p.device.type, p.dtype) for p in parameters} == {("meta", dtype)}
    assert model(torch.zeros(1, 1, 9, 9, device="meta", dtype=dtype)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("relu", [False, True])
def test_relu_ends_the_bottleneck_if_asked_for(relu):
    torch.manual_seed(0)
    model = bottlenecked(digits_net(), ["0", "1"], channels=2, relu=relu)
    assert (model[0](torch.randn(4, 1, 8, 8)).min() >= 0) == relu


def test_equal_seeds_make_equal_bottlenecks():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(bottlenecked(digits_net(), ["0", "1"], channels=2))
    for one, other in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(one, other)


def test_input_channels_may_be_given_where_no_convolution_tells():
    model = bottlenecked(digits_net(), ["1", "2"], channels=2, in_channels=4)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3, 2, 2)


class Pair(nn.Module):
    def forward(self, features):
        return features, features


BROKEN = nn.Sequential(
    convolution(1, 4), nn.Flatten(), nn.AdaptiveAvgPool2d(3), nn.Upsample(scale_factor=2), Pair()
)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"replace": []}, r"replace must name one module at least"),
        ({"replace": ["layer9"]}, r"the model has no module 'layer9'$"),
        ({"replace": ["0.O"]}, r"the model has no module '0\.O'; did you mean 0\.\d"),
        ({"replace": [""]}, r"the model has no module ''"),
        ({"replace": ["0", "0"]}, r"'0' is there twice"),
        ({"replace": ["0", "0.1"]}, r"'0\.1' lies inside '0', which is replaced too"),
        ({"replace": ["1"]}, r"'1' has no convolution .* give in_channels"),
        ({"replace": ["0", "0"], "channels": 0}, r"channels must be a number > 0, got 0"),
        ({"replace": ["0"], "hidden": 0}, r"hidden must be a number > 0, got 0"),
        ({"replace": ["0"], "in_channels": 0}, r"in_channels must be a number > 0, got 0"),
        ({"replace": ["0"], "in_channels": 5}, r"'0' does not run on .* replace must name"),
        ({"replace": ["0", "0.0"][::-1]}, r"'0\.0' lies inside '0'"),
        ({"replace": ["0", "1"]}, r"'1' must give maps .* \(1, 1, 64, 64\), but gave \(1, 16384\)"),
        ({"replace": ["0", "4"]}, r"'4' must give maps .* but gave tuple"),
        (
            {"replace": ["0", "2"]},
            r"does not follow from a stride: 64 -> \(3, 3\), 160 -> \(3, 3\)",
        ),
        ({"replace": ["0", "3"]}, r"does not follow from a stride: 64 -> \(128, 128\)"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_leaves_the_model_as_it_was(params, message):
    model = copy.deepcopy(BROKEN)
    with pytest.raises(ValueError, match=rf"bottlenecked: .*{message}"):
        bottlenecked(model, **{"channels": 2, **params})
    assert model.state_dict().keys() == BROKEN.state_dict().keys()
    assert model.training
