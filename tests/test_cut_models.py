"""torchvision's models can be cut to what a stage needs."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from distill.model.branches import without_side_branches

PATHS = {
    "convnext_tiny": "features.1",
    "densenet121": "features.denseblock2",
    "efficientnet_b0": "features.5",
    "fcn_resnet50": "backbone.layer2",
    "mobilenet_v3_small": "features.5",
    "resnet18": "layer1.1.relu",
    "shufflenet_v2_x1_0": "stage3",
    "swin_t": "features.3",
    "vit_b_16": "encoder.layers.encoder_layer_1",
}


@pytest.mark.parametrize(("name", "path"), PATHS.items())
def test_models_in_a_row_can_be_traced_and_have_no_side_branches(name: str, path: str) -> None:
    with torch.device("meta"):
        backbone = {"weights_backbone": None} if name == "fcn_resnet50" else {}
        model = models.get_model(name, weights=None, **backbone).train()
    assert without_side_branches(model, [path], []) is None


@pytest.mark.parametrize(
    ("name", "tapped", "parts", "branches"),
    [
        ("googlenet", ["inception5b"], [], {"aux1", "aux2"}),
        ("googlenet", [], ["0"], {"aux1", "aux2"}),
        ("inception_v3", ["Mixed_7c"], [], {"AuxLogits"}),
        ("fcn_resnet50", [], ["out"], {"aux_classifier"}),
    ],
)
def test_auxiliary_heads_are_left_out(
    name: str, tapped: list[str], parts: list[str], branches: set[str]
) -> None:
    heads: dict[str, object] = {"init_weights": False}
    if name == "fcn_resnet50":
        heads = {"aux_loss": True, "weights_backbone": None}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **heads).train()
    less = without_side_branches(model, tapped, parts)
    assert less is not None
    assert set(less.left_out) == branches
