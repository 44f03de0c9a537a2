import pickle

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.datasets import FakeData, VisionDataset
from torchvision.transforms import v2

from distill import Sample
from distill_datasets_vision import TVTensors, distill_datasets

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>4</ymax>"
    "</bndbox></object>"
)


@pytest.fixture
def voc(tmp_path):
    """Two images of 8 x 6 pixels with a mask and boxes, as VOC has them."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        (base / folder).mkdir(parents=True)
    for part in ("Segmentation", "Main"):
        (base / "ImageSets" / part).mkdir(parents=True)
        (base / "ImageSets" / part / "train.txt").write_text("one\ntwo\n")
    for number, name in enumerate(("one", "two")):
        Image.new("RGB", (8, 6)).save(base / "JPEGImages" / f"{name}.jpg")
        mask = Image.new("P", (8, 6), 0)
        mask.putpalette([0, 0, 0, 128, 0, 0] * 128)
        mask.paste(1 + number, (0, 0, 4, 6))
        mask.save(base / "SegmentationClass" / f"{name}.png")
        objects = OBJECT.format("cat") + OBJECT.format("dog") * number
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return tmp_path


def opened(name, root, **params):
    return distill_datasets()[name](root=str(root), image_set="train", **params)


class Pairs(VisionDataset):
    """A data set torchvision does not know: an image and a mask image, as tuple or ``Sample``."""

    def __init__(self, as_sample=False):
        super().__init__("nowhere")
        self.as_sample = as_sample
        self.classes = ["road", "sky"]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        image, mask = Image.new("RGB", (4, 3)), Image.new("L", (4, 3), 1)
        return Sample(image, mask, extras={"kept": 5}) if self.as_sample else (image, mask)


def test_masks_of_a_torchvision_data_set_are_class_numbers_by_height_and_width(voc):
    data = TVTensors(opened("VOCSegmentation", voc))
    image, mask = data[1]
    assert len(data) == 2
    assert image.size == (8, 6)
    assert type(mask) is tv_tensors.Mask
    assert (mask.shape, mask.dtype) == ((6, 8), torch.uint8)
    assert mask[0].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]


def test_boxes_of_a_torchvision_data_set_know_their_image(voc):
    _, target = TVTensors(opened("VOCDetection", voc))[1]
    assert target.keys() == {"boxes", "labels"}
    assert target["boxes"].tolist() == [[1, 2, 5, 4]] * 2
    assert target["boxes"].canvas_size == (6, 8)
    assert target["labels"].tolist() == [8, 12]  # of the twenty


def test_target_keys_choose_what_is_kept(voc):
    _, target = TVTensors(opened("VOCDetection", voc), target_keys=["boxes"])[0]
    assert target.keys() == {"boxes"}
    with pytest.raises(ValueError, match="no target_keys to choose of Pairs"):
        TVTensors(Pairs(), ["boxes"])
    with pytest.raises(ValueError, match="not available"):
        TVTensors(opened("VOCDetection", voc), ["bozes"])


def test_boxes_may_be_of_other_classes_than_those_of_voc(voc):
    data = TVTensors(opened("VOCDetection", voc), classes=["dog", "cat"])
    assert data.classes == ("__background__", "dog", "cat")
    _, target = data[1]
    assert target.keys() == {"boxes", "labels"}
    assert target["labels"].tolist() == [2, 1]
    assert type(target["boxes"]) is tv_tensors.BoundingBoxes
    only = TVTensors(opened("VOCDetection", voc), ["labels"], classes=["dog", "cat"])
    assert only[0][1].keys() == {"labels"}


def test_a_box_of_another_class_is_named(voc):
    data = TVTensors(opened("VOCDetection", voc), classes=["dog"])
    with pytest.raises(ValueError, match="a box has the class 'cat'; given are dog"):
        data[0]
    annotation = voc / "VOCdevkit/VOC2012/Annotations/one.xml"
    annotation.write_text(annotation.read_text().replace("cat", "RBC"))
    with pytest.raises(ValueError, match=r"'RBC' is none of VOC's classes: .* params.classes"):
        TVTensors(opened("VOCDetection", voc))[0]
    with pytest.raises(ValueError, match="classes are for VOCDetection, not for Pairs"):
        TVTensors(Pairs(), classes=["dog"])


@pytest.mark.parametrize("as_sample", [False, True])
def test_mask_images_of_any_data_set_become_masks(as_sample):
    data = TVTensors(Pairs(as_sample))
    item = data[0]
    mask = item.target if as_sample else item[1]
    assert type(mask) is tv_tensors.Mask
    assert mask.tolist() == [[1] * 4] * 3
    assert not as_sample or item.extras == {"kept": 5}
    assert data.classes == ["road", "sky"]


def test_labels_stay_as_they_are():
    data = TVTensors(FakeData(2, (3, 4, 4), 10))
    assert data[1][1] == FakeData(2, (3, 4, 4), 10)[1][1]
    assert not hasattr(data, "classes")


@pytest.mark.parametrize("name", ["VOCSegmentation", "VOCDetection"])
def test_it_can_be_sent_to_a_loader_worker(name, voc):
    data = TVTensors(opened(name, voc))
    (_, here), (_, there) = data[1], pickle.loads(pickle.dumps(data))[1]
    for ours, theirs in zip(*map(torch.utils._pytree.tree_leaves, (here, there)), strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Anti-alias:UserWarning")
def test_image_and_mask_are_cut_and_turned_together(voc):
    image, mask = TVTensors(opened("VOCSegmentation", voc))[0]
    image = Image.fromarray((mask * 100).numpy())
    transforms = [
        v2.RandomAffine(20),
        v2.RandomCrop(12, pad_if_needed=True),
        v2.RandomResizedCrop(4, interpolation=v2.InterpolationMode.NEAREST),
        v2.RandomHorizontalFlip(1.0),
        v2.ToImage(),
    ]
    torch.manual_seed(0)
    for transform in transforms:
        image, mask = transform(image, mask)
    assert mask.shape == (4, 4)
    assert len(mask.unique()) == 2
    assert torch.equal(image[0], mask * 100)


def test_boxes_move_with_the_image(voc):
    image, target = TVTensors(opened("VOCDetection", voc))[0]
    _, flipped = v2.RandomHorizontalFlip(1.0)(image, target)
    assert flipped["boxes"].tolist() == [[3, 2, 7, 4]]
    assert flipped["labels"].tolist() == [8]
