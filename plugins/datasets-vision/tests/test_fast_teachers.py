"""Models of torchvision in the form in which frozen teachers run faster."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from distill.model.fast import cast, fold, foldable, relative_error


def warmed(name):
    """A model whose BatchNorms have seen something."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "folded", "there"),
    [
        ("resnet18", 20, 20),
        ("mobilenet_v3_small", 34, 34),
        ("densenet121", 59, 121),  # the others come before a convolution, behind none
    ],
)
def test_batchnorms_behind_convolutions_are_folded_and_the_logits_stay(name, folded, there):
    model, images = warmed(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        pairs, ran = foldable(model, lambda: model(images), [])
        fold(model, pairs)
        assert (len(pairs), ran) == (folded, there)
        assert relative_error(expected, model(images)) < 1e-5


def test_a_resnet_in_bf16_and_channels_last_is_close_to_the_plain_one():
    model, images = warmed("resnet18"), torch.randn(4, 3, 64, 64)
    fast = copy.deepcopy(model)
    with torch.no_grad():
        fold(fast, foldable(fast, lambda: fast(images), [])[0])
        cast(fast, torch.bfloat16)
        fast.to(memory_format=torch.channels_last)
        given = images.to(torch.bfloat16, memory_format=torch.channels_last)
        assert relative_error(model(images), fast(given).float()) < 0.03
