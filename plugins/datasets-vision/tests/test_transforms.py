import inspect
from enum import Enum
from typing import get_type_hints

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from distill_datasets_vision import distill_transforms
from distill_datasets_vision.transforms import LEFT_OUT

# What a transform cannot be made without; as core makes it of a file's text, numbers and lists.
REQUIRED = {
    "CenterCrop": {"size": 8},
    "GaussianBlur": {"kernel_size": 3},
    "JPEG": {"quality": 50},
    "LinearTransformation": {
        "transformation_matrix": torch.eye(3 * 16 * 16),
        "mean_vector": torch.zeros(3 * 16 * 16),
    },
    "Normalize": {"mean": [0.5], "std": [0.5]},
    "Pad": {"padding": 1},
    "RandomAdjustSharpness": {"sharpness_factor": 2.0},
    "RandomAffine": {"degrees": 10},
    "RandomCrop": {"size": 8},
    "RandomPosterize": {"bits": 2},
    "RandomResize": {"min_size": 8, "max_size": 12},
    "RandomResizedCrop": {"size": 8},
    "RandomRotation": {"degrees": 10},
    "RandomShortestSize": {"min_size": 8},
    "RandomSolarize": {"threshold": 0.5},
    "Resize": {"size": 8},
    "ScaleJitter": {"target_size": (8, 8)},
    "ToDtype": {"dtype": torch.float32},
    "UniformTemporalSubsample": {"num_samples": 1},
}
PIL_ONLY = {"PILToTensor", "ToTensor"}
SHAPES = {"ElasticTransform": (3, 48, 48), "UniformTemporalSubsample": (4, 3, 16, 16)}
FLOAT_ONLY = {"GaussianNoise", "LinearTransformation", "Normalize", "RandomSolarize"}


def image_for(name):
    if name in PIL_ONLY:
        return Image.new("RGB", (16, 16))
    if name in FLOAT_ONLY:
        return torch.rand(3, 16, 16)
    return torch.randint(0, 256, SHAPES.get(name, (3, 16, 16)), dtype=torch.uint8)


def test_every_v2_transform_is_offered_or_left_out_for_a_reason():
    public = {
        name
        for name, member in vars(v2).items()
        if inspect.isclass(member) and issubclass(member, v2.Transform) and name[0] != "_"
    }
    offered = distill_transforms()
    assert offered.keys() == public - LEFT_OUT.keys()
    assert all(offered[name] is getattr(v2, name) for name in offered)
    assert {"RandomCrop", "RandomHorizontalFlip", "Normalize", "ToImage"} <= offered.keys()


@pytest.mark.parametrize("name", sorted(distill_transforms()))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_transform_turns_one_image_into_one_image(name):
    transform = distill_transforms()[name](**REQUIRED.get(name, {}))
    result = transform(image_for(name))
    assert isinstance(result, (torch.Tensor, Image.Image))


@pytest.mark.parametrize("name", sorted(distill_transforms()))
def test_a_transform_says_what_parameters_it_takes(name):
    factory = distill_transforms()[name]
    parameters = inspect.signature(factory, eval_str=True).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty}
    assert required == REQUIRED.get(name, {}).keys()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_hints_tell_text_from_enum_members_and_dtypes():
    offered = distill_transforms()
    policy = get_type_hints(offered["AutoAugment"].__init__)["policy"]
    assert issubclass(policy, Enum)
    assert torch.dtype in get_type_hints(offered["ToDtype"].__init__)["dtype"].__args__
