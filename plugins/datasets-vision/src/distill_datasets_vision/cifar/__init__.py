"""The networks of the CIFAR literature, for 32x32 images.

Architecture, initial weights and the names of parameters are those that the distillation literature
compares methods with. ``num_classes`` is 100 unless given, as in its tables.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from distill_datasets_vision.cifar import densenet, mobilenet, resnet, shufflenet, vgg, wide_resnet

_BUILDERS: tuple[Callable[..., nn.Module], ...] = (
    densenet.cifar_densenet_bc_40_12,
    densenet.cifar_densenet_bc_100_12,
    densenet.cifar_densenet_bc_190_40,
    densenet.cifar_densenet_bc_250_24,
    mobilenet.cifar_mobilenet_v2,
    mobilenet.cifar_mobilenet_v2_half,
    resnet.cifar_resnet8,
    resnet.cifar_resnet14,
    resnet.cifar_resnet20,
    resnet.cifar_resnet32,
    resnet.cifar_resnet44,
    resnet.cifar_resnet56,
    resnet.cifar_resnet110,
    resnet.cifar_resnet8x4,
    resnet.cifar_resnet32x4,
    resnet.cifar_resnet18,
    resnet.cifar_resnet34,
    resnet.cifar_resnet50,
    shufflenet.cifar_shufflenet_v1,
    shufflenet.cifar_shufflenet_v2,
    vgg.cifar_vgg8,
    vgg.cifar_vgg11,
    vgg.cifar_vgg13,
    vgg.cifar_vgg16,
    vgg.cifar_vgg19,
    wide_resnet.cifar_wrn_16_1,
    wide_resnet.cifar_wrn_16_2,
    wide_resnet.cifar_wrn_28_2,
    wide_resnet.cifar_wrn_28_10,
    wide_resnet.cifar_wrn_40_1,
    wide_resnet.cifar_wrn_40_2,
)


def cifar_models() -> dict[str, Callable[..., nn.Module]]:
    """Return the builder of every network, by its name."""
    return {builder.__name__: builder for builder in _BUILDERS}
