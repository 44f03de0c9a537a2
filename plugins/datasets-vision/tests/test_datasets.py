import inspect

import torchvision
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset

from distill_datasets_vision import (
    Digits,
    ImageFiles,
    ImageMaskFolders,
    Packed,
    distill_datasets,
)


def test_every_torchvision_data_set_is_offered_by_its_name():
    concrete = {
        name: member
        for name, member in vars(torchvision.datasets).items()
        if inspect.isclass(member)
        and issubclass(member, Dataset)
        and member not in (VisionDataset, torchvision.datasets.DatasetFolder)
    }
    own = {
        "Digits": Digits,
        "ImageFiles": ImageFiles,
        "ImageMaskFolders": ImageMaskFolders,
        "Packed": Packed,
    }
    offered = distill_datasets()
    assert offered.keys() == concrete.keys() | own.keys()
    assert all(offered[name] is own[name] for name in own)
    assert all(offered[name].__name__ == name for name in concrete)
    assert {"CIFAR10", "CIFAR100", "ImageFolder", "ImageNet", "FakeData"} <= concrete.keys()


def test_every_data_set_says_what_parameters_it_takes():
    for name, factory in distill_datasets().items():
        parameters = inspect.signature(factory, eval_str=True).parameters
        assert parameters, name


def test_a_data_set_is_made_by_name():
    data = distill_datasets()["FakeData"](size=3, image_size=(1, 4, 4), num_classes=2)
    assert len(data) == 3
