import pytest
import torch
from torchvision.transforms import v2

from distill_datasets_vision.nested_transforms import RandomApply, RandomChoice, RandomOrder

FLIP = {"type": "RandomHorizontalFlip", "params": {"p": 1.0}}
IMAGE = torch.arange(6.0).view(1, 2, 3)


@pytest.mark.parametrize(("p", "flipped"), [(1.0, True), (0.0, False)])
def test_all_or_none_are_applied(p, flipped):
    given = RandomApply([FLIP, "Identity"], p=p)(IMAGE)
    assert torch.equal(given, IMAGE.flip(-1) if flipped else IMAGE)


def test_one_is_chosen_with_its_weight():
    other = {"type": "RandomVerticalFlip", "params": {"p": 1.0}}
    assert torch.equal(RandomChoice([FLIP, other], p=[0.0, 1.0])(IMAGE), IMAGE.flip(-2))


def test_all_are_applied_in_some_order():
    rows = RandomOrder([FLIP, {"type": "Pad", "params": {"padding": [0, 1]}}])
    assert isinstance(rows, v2.RandomOrder)
    assert rows(IMAGE).shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("component", "said"),
    [
        ("ColorJiter", "no transform 'ColorJiter'; did you mean ColorJitter"),
        ({"typ": "Identity"}, "expected {type: Name"),
    ],
)
def test_what_is_no_transform_is_told(component, said):
    with pytest.raises(ValueError, match=said):
        RandomApply([component])
