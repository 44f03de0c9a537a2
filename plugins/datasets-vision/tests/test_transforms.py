import inspect
from enum import Enum

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from distill.signature import bind
from distill_datasets_vision.transforms import LEFT_OUT, torchvision_transforms

# What a transform cannot be made without; as core makes it of a file's text, numbers and lists.
REQUIRED = {
    "CenterCrop": {"size": 8},
    "ConvertBoundingBoxFormat": {"format": "XYWH"},
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
    "SetClampingMode": {"clamping_mode": "hard"},
    "ToDtype": {"dtype": torch.float32},
    "UniformTemporalSubsample": {"num_samples": 1},
}
PIL_ONLY = {"PILToTensor", "ToTensor"}
SHAPES = {"ElasticTransform": (3, 48, 48), "UniformTemporalSubsample": (4, 3, 16, 16)}
NEEDS_TARGET = {"RandomIoUCrop", "SanitizeBoundingBoxes", "SanitizeKeyPoints"}
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
    offered = torchvision_transforms()
    assert offered.keys() == public - LEFT_OUT.keys()
    assert LEFT_OUT.keys() <= public
    assert {"RandomCrop", "RandomHorizontalFlip", "Normalize", "ToImage"} <= offered.keys()


@pytest.mark.parametrize("name", sorted(torchvision_transforms().keys() - NEEDS_TARGET))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_transform_turns_one_image_into_one_image(name):
    transform = torchvision_transforms()[name](**REQUIRED.get(name, {}))
    result = transform(image_for(name))
    assert isinstance(result, (torch.Tensor, Image.Image))


@pytest.mark.parametrize("name", sorted(torchvision_transforms()))
def test_a_transform_says_what_parameters_it_takes(name):
    factory = torchvision_transforms()[name]
    parameters = inspect.signature(factory, eval_str=True).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty}
    assert required == REQUIRED.get(name, {}).keys()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_hints_tell_text_from_enum_members_and_dtypes():
    offered = torchvision_transforms()
    policy = inspect.signature(offered["AutoAugment"], eval_str=True).parameters["policy"]
    assert issubclass(policy.annotation, Enum)
    dtype = inspect.signature(offered["ToDtype"], eval_str=True).parameters["dtype"]
    assert torch.dtype in dtype.annotation.__args__


def detection():
    boxes = [[2, 2, 9, 9], [4, 1, 12, 14]]
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(16, 16)),
        "masks": tv_tensors.Mask(torch.ones(2, 16, 16, dtype=torch.uint8)),
        "labels": torch.tensor([3, 5]),
    }


FOR_INPUTS_ALONE = {"AugMix", "AutoAugment", "RandAugment", "TrivialAugmentWide"}
NOT_TRIED_WITH_BOXES = {
    "ElasticTransform",  # wants larger images
    "LinearTransformation",
    "SanitizeKeyPoints",
    "UniformTemporalSubsample",
}


@pytest.mark.parametrize("name", sorted(FOR_INPUTS_ALONE))
def test_the_automatic_augmentations_refuse_boxes_and_masks(name):
    with pytest.raises(TypeError, match=f"BoundingBoxes are not supported by {name}"):
        torchvision_transforms()[name]()(image_for(name), detection())


@pytest.mark.parametrize(
    "name", sorted(torchvision_transforms().keys() - FOR_INPUTS_ALONE - NOT_TRIED_WITH_BOXES)
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_joint_transform_takes_and_gives_image_and_target(name):
    torch.manual_seed(0)
    transform = torchvision_transforms()[name](**REQUIRED.get(name, {}))
    given = image_for(name)
    image = tv_tensors.Image(given[..., :16, :16]) if isinstance(given, torch.Tensor) else given
    changed, target = transform(image, detection())
    assert isinstance(changed, (torch.Tensor, Image.Image))
    assert target.keys() == detection().keys()
    assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
    assert set(target["labels"].tolist()) <= {3, 5}


def test_boxes_that_an_image_has_lost_are_left_out_with_their_masks_and_labels():
    target = detection()
    target["boxes"][0] = torch.tensor([5, 5, 5, 9])
    _, kept = torchvision_transforms()["SanitizeBoundingBoxes"]()(
        Image.new("RGB", (16, 16)), target
    )
    assert kept["labels"].tolist() == [5]
    assert len(kept["boxes"]) == len(kept["masks"]) == 1


def test_key_points_that_an_image_has_lost_are_left_out():
    points = tv_tensors.KeyPoints([[[1, 1]], [[30, 5]]], canvas_size=(16, 16))
    _, kept = torchvision_transforms()["SanitizeKeyPoints"]()(Image.new("RGB", (16, 16)), points)
    assert kept.tolist() == [[[1, 1]]]


def made(name, **params):
    """Build it as core does, from what a file holds."""
    binding = bind(torchvision_transforms()[name], params)
    assert not binding.problems
    return torchvision_transforms()[name](**binding.arguments)


def test_fill_may_differ_for_image_and_mask():
    image, mask = Image.new("RGB", (4, 4), (9, 9, 9)), tv_tensors.Mask(torch.ones(4, 4))
    pad = made("Pad", padding=1, fill={"Mask": 255, "others": 7})
    image, mask = pad(image, mask)
    assert image.getpixel((0, 0)) == (7, 7, 7)
    assert mask[0, 0] == 255
    assert mask[1, 1] == 1
    assert type(made("RandomCrop", size=2, fill=3)) is v2.RandomCrop


def test_dtype_may_differ_for_image_and_mask():
    image = tv_tensors.Image(torch.full((3, 2, 2), 255, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.full((2, 2), 11, dtype=torch.uint8))
    kinds = {"Image": "float32", "Mask": "torch.int64", "others": None}
    image, mask = made("ToDtype", dtype=kinds, scale=True)(image, mask)
    assert image.unique().tolist() == [1.0]
    assert (mask.dtype, mask.unique().tolist()) == (torch.int64, [11])
    assert made("ToDtype", dtype="float16")(image).dtype == torch.float16


def test_an_unknown_kind_or_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"fill names 'mask': known are .*Mask, .*, others"):
        made("Pad", padding=1, fill={"mask": 255})
    with pytest.raises(ValueError, match="dtype has the value 'int46': known are float32"):
        made("ToDtype", dtype={"Mask": "int46"})


@pytest.mark.parametrize("name", sorted(torchvision_transforms()))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_transform_is_torchvision_s_own(name):
    transform = torchvision_transforms()[name](**REQUIRED.get(name, {}))
    assert type(transform) is getattr(v2, name)
