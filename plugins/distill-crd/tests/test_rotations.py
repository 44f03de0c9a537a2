"""Four views of every image: what is turned, what is shared, what is refused."""

from __future__ import annotations

import pytest
import torch

from distill import DistillError, Sample, Views, labels
from distill.testing import ToyData
from distill_crd.rotations import Rotations


class Images:
    """A data set of one image."""

    def __init__(self, image, **more):
        self.image = image
        vars(self).update(more)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.image, 3


CORNERS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
TURNED = [
    [[1.0, 2.0], [3.0, 4.0]],
    [[2.0, 4.0], [1.0, 3.0]],
    [[4.0, 3.0], [2.0, 1.0]],
    [[3.0, 1.0], [4.0, 2.0]],
]
"""As a person turns a picture to the left, once, twice and three times."""


def views(image, **params):
    return Rotations(Images(image), **params)[0].input


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_tensors_are_turned_counter_clockwise_with_all_their_channels(dtype):
    image = torch.stack([CORNERS, CORNERS + 10]).to(dtype)
    given = views(image)
    assert isinstance(given, Views)
    assert len(given) == 4
    assert all(view.dtype == dtype for view in given)
    assert [view[0].tolist() for view in given] == TURNED
    assert [(view[1] - 10).tolist() for view in given] == TURNED


def test_pil_images_are_turned_as_tensors_are():
    pil = pytest.importorskip("PIL.Image")
    image = pil.new("L", (2, 2))
    image.putdata([1, 2, 3, 4])
    given = views(image)
    assert [[view.getpixel((x, y)) for y in range(2) for x in range(2)] for view in given] == [
        [int(value) for row in turned for value in row] for turned in TURNED
    ]


def test_height_and_width_change_places():
    pil = pytest.importorskip("PIL.Image")
    shapes = [tuple(view.shape) for view in views(torch.zeros(3, 4, 6))]
    assert shapes == [(3, 4, 6), (3, 6, 4)] * 2
    assert [view.size for view in views(pil.new("RGB", (6, 4)))] == [(6, 4), (4, 6)] * 2


def test_tv_tensors_stay_what_they_are():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    given = views(tv_tensors.Image(CORNERS[None]))
    assert all(type(view) is tv_tensors.Image for view in given)
    assert [view[0].tolist() for view in given] == TURNED


def test_a_sample_keeps_all_but_its_input():
    data = [Sample(CORNERS[None], 7, extras={"note": 1})]
    sample = Rotations(data)[0]
    assert (sample.target, sample.extras) == (7, {"note": 1})
    assert len(sample.input) == 4


def test_labels_and_classes_are_seen_without_reading():
    class Unreadable(ToyData):
        def __getitem__(self, index):
            raise AssertionError

    data = Unreadable(6)
    assert labels(Rotations(data), read=False) == data.labels
    assert Rotations(data).classes == data.classes
    assert len(Rotations(data)) == 6


def test_shared_transforms_are_applied_once_before_turning():
    pytest.importorskip("torchvision")
    flip = {"type": "RandomHorizontalFlip", "params": {"p": 1.0}}
    flipped = CORNERS.flip(1)
    given = views(CORNERS[None], shared=[flip])
    assert [view[0].tolist() for view in given] == [
        torch.rot90(flipped, quarters).tolist() for quarters in range(4)
    ]
    back = views(CORNERS[None], shared=[flip, flip])
    assert [view[0].tolist() for view in back] == TURNED


def test_a_shared_transform_draws_once_for_all_four():
    pytest.importorskip("torchvision")
    data = Rotations(Images(CORNERS[None]), shared=["RandomHorizontalFlip"])
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        given = [view[0] for view in data[0].input]
        undone = {str(torch.rot90(view, -k).tolist()) for k, view in enumerate(given)}
        assert len(undone) == 1
        seen |= undone
    assert len(seen) == 2


def test_what_is_no_transform_is_refused():
    with pytest.raises(ValueError, match=r"shared takes transforms as .*got \{'p': 1\}"):
        Rotations(Images(CORNERS), shared=[{"p": 1}])
    with pytest.raises(DistillError, match="there is no transform 'RandomHorizontalFlop'"):
        Rotations(Images(CORNERS), shared=["RandomHorizontalFlop"])


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (torch.zeros(5), r"a tensor \(5,\)"),
        ("a path", "str"),
        (Views((CORNERS,)), "Views; a data set needs it once"),
    ],
)
def test_what_cannot_be_turned_is_named(image, got):
    with pytest.raises(ValueError, match=f"PIL images and tensors .*, got {got}"):
        views(image)
