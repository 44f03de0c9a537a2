"""Whole batches, against torchvision image by image."""

import inspect
import pickle

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from distill_datasets_vision import distill_batched_transforms, distill_transforms
from distill_datasets_vision.batched_transforms import erased_boxes, resized_crop_boxes

FORMS = distill_batched_transforms()
FLOAT32 = torch.float32
NOTHING = torch.empty(6, 0)
# Every transform that draws nothing, with parameters that reach into its branches.
DETERMINISTIC = [
    ("CenterCrop", {"size": 8}),
    ("CenterCrop", {"size": (20, 8)}),
    ("ConvertImageDtype", {"dtype": FLOAT32}),
    ("Grayscale", {"num_output_channels": 3}),
    ("PILToTensor", {}),
    ("Pad", {"padding": [1, 2, 3, 4], "fill": 7}),
    ("Pad", {"padding": 2, "padding_mode": "reflect"}),
    ("Resize", {"size": 11}),
    ("Resize", {"size": (24, 9), "interpolation": "bicubic"}),
    ("Resize", {"size": 20, "antialias": False}),
    ("ToDtype", {"dtype": FLOAT32, "scale": True}),
    ("ToDtype", {"dtype": torch.int32}),
    ("ToImage", {}),
    ("ToPureTensor", {}),
]


def images(count=6, height=17, width=14, channels=3):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(
        0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator
    )


def drawn(form, count=6, seed=0):
    return torch.rand(count, form.draws, generator=torch.Generator().manual_seed(seed))


def one_by_one(function, given, *arguments):
    columns = [list(argument) for argument in arguments]
    rows = zip(given, *columns, strict=True)
    return torch.stack([torch.as_tensor(function(image, *rest)) for image, *rest in rows])


@pytest.mark.parametrize(("name", "params"), DETERMINISTIC)
def test_what_draws_nothing_gives_the_bits_of_the_transform_on_each_image(name, params):
    form, transform = FORMS[name](**params), distill_transforms()[name](**params)
    given = images()
    single = [tv_tensors.Image(image) for image in given]
    if name == "PILToTensor":
        single = [F.to_pil_image(image) for image in given]
    expected = torch.stack([transform(image).as_subclass(torch.Tensor) for image in single])
    result = form(given, NOTHING)
    assert form.draws == 0
    assert type(result) is torch.Tensor
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


def test_images_are_scaled_and_normalized_to_the_same_bits():
    params = {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]}
    scaled = FORMS["ToDtype"](dtype=FLOAT32, scale=True)(images(), NOTHING)
    form, transform = FORMS["Normalize"](**params), distill_transforms()["Normalize"](**params)
    before = scaled.clone()
    assert torch.equal(form(scaled, NOTHING), one_by_one(transform, scaled))
    assert torch.equal(scaled, before)
    with pytest.raises(TypeError, match="should be a float tensor"):
        form(images(), NOTHING)
    with pytest.raises(ValueError, match="division by zero"):
        FORMS["Normalize"]([0.5], [0.0])(scaled, NOTHING)
    assert torch.equal(pickle.loads(pickle.dumps(form))(scaled, NOTHING), form(scaled, NOTHING))


def test_every_transform_has_a_batched_form_or_none_and_takes_the_same_parameters():
    for name, make in FORMS.items():
        single = inspect.signature(distill_transforms()[name], eval_str=True)
        assert inspect.signature(make, eval_str=True).parameters == single.parameters
    assert FORMS["Pad"](padding=1, fill={"Mask": 255, "others": 7}) is None
    assert FORMS["ToDtype"](dtype={"Image": "float32", "others": None}) is None
    assert FORMS["RandomErasing"](value="random") is None


def test_only_what_comes_from_one_value_alone_is_pointwise():
    made = [FORMS[name](**params) for name, params in DETERMINISTIC]
    pointwise = {
        name for (name, _), form in zip(DETERMINISTIC, made, strict=True) if form.pointwise
    }
    changes_values = {"ConvertImageDtype", "ToDtype"}
    assert pointwise == changes_values | {"PILToTensor", "ToImage", "ToPureTensor"}
    assert FORMS["Normalize"]([0.5], [0.5]).pointwise
    assert not FORMS["RandomHorizontalFlip"]().pointwise


def test_batches_are_of_images_and_no_masks_nor_pil_images():
    crop, scale = FORMS["RandomCrop"](4), FORMS["ToDtype"](FLOAT32)
    image = torch.zeros(3, 8, 8)
    for form in (crop, scale):
        assert form.takes(image)
        assert form.takes(tv_tensors.Image(image))
        assert not form.takes(tv_tensors.Mask(image))
        assert not form.takes(Image.new("RGB", (8, 8)))
        assert not form.takes(torch.zeros(8))
    clip = torch.zeros(5, 3, 8, 8)
    assert (crop.takes(clip), scale.takes(clip)) == (False, True)


@pytest.mark.parametrize(
    "params",
    [
        {"size": 8},
        {"size": (16, 10), "padding": 4},
        {"size": 14, "padding": [1, 2], "fill": 9},
        {"size": 12, "padding": [1, 2, 3, 4], "fill": [1, 2, 3]},
        {"size": 16, "padding": 3, "padding_mode": "reflect"},
        {"size": 30, "pad_if_needed": True},
        {"size": (17, 14)},
    ],
)
def test_a_crop_is_torchvision_s_at_the_drawn_place(params):
    form, given = FORMS["RandomCrop"](**params), images()
    draws = drawn(form)
    reference = distill_transforms()["RandomCrop"](**params)
    torch.manual_seed(0)
    found = reference.make_params([given[0]])
    left, top, right, bottom = found["padding"]
    height, width = found["height"], found["width"]
    rows, columns = 17 + top + bottom - height + 1, 14 + left + right - width + 1

    def crop(image, numbers):
        options = {"fill": params.get("fill", 0)}
        options["padding_mode"] = params.get("padding_mode", "constant")
        padded = F.pad(image, found["padding"], **options)
        place = int(numbers[0] * rows), int(numbers[1] * columns)
        return F.crop(padded, *place, height, width)

    assert torch.equal(form(given, draws), one_by_one(crop, given, draws))


def test_crops_lie_at_every_place_alike_often_both_ends_included():
    # A picture whose values tell row and column.
    given = (torch.arange(36).view(1, 1, 6, 6)).expand(9000, 1, 6, 6).to(torch.uint8)
    form = FORMS["RandomCrop"](4)
    places = form(given, drawn(form, 9000))[:, 0, 0, 0]
    counts = torch.stack(
        [(places == 6 * row + column).sum() for row in range(3) for column in range(3)]
    )
    assert counts.sum() == 9000
    assert (counts - 1000).abs().max() < 5 * 30
    top = torch.full((1, 2), 1 - 2**-24)
    assert form(given[:1], top)[0, 0, 0, 0] == 14


def test_a_crop_larger_than_the_images_is_refused():
    form = FORMS["RandomCrop"](20)
    with pytest.raises(ValueError, match=r"crop size \(20, 20\) is larger than input image size"):
        form(images(), drawn(form))


@pytest.mark.parametrize(
    ("name", "flip"),
    [("RandomHorizontalFlip", F.horizontal_flip), ("RandomVerticalFlip", F.vertical_flip)],
)
def test_images_are_flipped_one_by_one_with_the_given_probability(name, flip):
    form, given = FORMS[name](p=0.3), images(2000, 4, 4)
    draws = drawn(form, 2000)
    result = form(given, draws)
    flipped = draws[:, 0] < 0.3
    expected = one_by_one(
        lambda image, is_flipped: flip(image) if is_flipped else image, given, flipped
    )
    assert torch.equal(result, expected)
    assert 500 < flipped.sum() < 700
    assert torch.equal(FORMS[name](p=1.0)(given, draws), flip(given))
    assert torch.equal(FORMS[name](p=0.0)(given, draws), given)


@pytest.mark.parametrize("channels", [1, 3])
def test_some_images_lose_their_colours(channels):
    form, given = FORMS["RandomGrayscale"](p=0.5), images(channels=channels)
    draws = drawn(form)
    grey = draws[:, 0] < 0.5
    assert 0 < grey.sum() < 6
    expected = one_by_one(
        lambda image, is_grey: F.rgb_to_grayscale(image, channels) if is_grey else image,
        given,
        grey,
    )
    assert torch.equal(form(given, draws), expected)


@pytest.mark.parametrize("options", [{}, {"interpolation": "bicubic"}, {"antialias": False}])
def test_a_resized_crop_is_torchvision_s_of_the_drawn_box(options):
    form, given = FORMS["RandomResizedCrop"](size=(10, 9), **options), images()
    draws = drawn(form)
    boxes = resized_crop_boxes(draws, 17, 14, (0.08, 1.0), (3 / 4, 4 / 3))
    expected = one_by_one(
        lambda image, box: F.resized_crop(image, *box.tolist(), size=(10, 9), **options),
        given,
        boxes,
    )
    assert torch.equal(form(given, draws), expected)


def moments(rows):
    return rows.double().mean(0), rows.double().std(0)


@pytest.mark.parametrize("name", ["RandomResizedCrop", "RandomErasing"])
def test_boxes_are_distributed_as_torchvision_s(name):
    params = {"scale": (0.1, 0.9), "ratio": (0.5, 2.5)}
    count, shape = 6000, (20, 12)
    draws = torch.rand(count, 22, generator=torch.Generator().manual_seed(1))
    image = torch.zeros(1, *shape)
    if name == "RandomErasing":
        reference, keys = distill_transforms()[name](**params), ("i", "j", "h", "w")
        boxes, found = erased_boxes(draws, *shape, *params.values())
        boxes = boxes[found]
    else:
        reference = distill_transforms()[name](size=4, **params)
        keys = ("top", "left", "height", "width")
        boxes = resized_crop_boxes(draws, *shape, *params.values())
    torch.manual_seed(0)
    made = [reference.make_params([image]) for _ in range(1500)]
    made = [one for one in made if one.get("v", 0) is not None]
    theirs = torch.tensor([[one[key] for key in keys] for one in made])
    assert (boxes >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= shape[0]).all()
    assert (boxes[:, 1] + boxes[:, 3] <= shape[1]).all()
    (mean, spread), (expected, expected_spread) = moments(boxes), moments(theirs)
    assert ((mean - expected).abs() < 5 * expected_spread / 1500**0.5).all()
    assert (spread / expected_spread - 1).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(40, 4), (4, 40), (5, 5)])
def test_a_box_that_never_fits_is_torchvision_s_central_one(shape):
    params = {"scale": (1.5, 2.0), "ratio": (0.5, 1.5)}
    reference = distill_transforms()["RandomResizedCrop"](size=4, **params)
    expected = reference.make_params([torch.zeros(1, *shape)])
    boxes = resized_crop_boxes(torch.rand(2, 22), *shape, *params.values())
    names = ("top", "left", "height", "width")
    assert boxes.tolist() == [[expected[name] for name in names]] * 2


@pytest.mark.parametrize("value", [0, [10.0, 20.0, 30.0]])
def test_some_images_lose_the_drawn_box(value):
    form, given = FORMS["RandomErasing"](p=0.6, value=value), images()
    draws = drawn(form)
    boxes, found = erased_boxes(draws[:, 1:], 17, 14, (0.02, 0.33), (0.3, 3.3))
    chosen = found & (draws[:, 0] < 0.6)
    assert 0 < chosen.sum() < 6
    colour = torch.tensor([float(value)] if value == 0 else value)[:, None, None]

    def erase(image, box, is_chosen):
        return F.erase(image, *box.tolist(), v=colour) if is_chosen else image

    assert torch.equal(form(given, draws), one_by_one(erase, given, boxes, chosen))
    with pytest.raises(ValueError, match="value has 2 numbers, the images 3 channels"):
        FORMS["RandomErasing"](value=[1.0, 2.0])(given, draws)


def test_colours_are_changed_in_the_drawn_order_by_the_drawn_factors():
    form, given = FORMS["ColorJitter"](0.4, 0.3, 0.2, 0.1), images()
    draws = drawn(form)
    functions = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    ranges = [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]

    def jitter(image, numbers):
        for step in numbers[:4].argsort().tolist():
            low, high = ranges[step]
            image = functions[step](image, low + numbers[4 + step].item() * (high - low))
        return image

    assert torch.equal(form(given, draws), one_by_one(jitter, given, draws))
    orders = drawn(form, 4800)[:, :4].argsort(1)
    assert len(orders.unique(dim=0)) == 24
    assert (orders[:, 0].bincount() - 1200).abs().max() < 5 * 30
