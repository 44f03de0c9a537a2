import inspect
import pickle
import socket
import sys
import types
import urllib.request

import pytest
import torchvision
from PIL import Image

from distill.signature import bind
from distill_datasets_vision import distill_datasets
from distill_datasets_vision.data_layouts import LAYOUTS
from distill_datasets_vision.missing_data import telling_what_is_missing

# What a class wants beside its root; {root} is the folder of the test.
REQUIRED = {
    "CocoCaptions": {"annFile": "{root}/captions.json"},
    "CocoDetection": {"annFile": "{root}/instances.json"},
    "EMNIST": {"split": "letters"},
    "Flickr30k": {"ann_file": "{root}/captions"},
    "Flickr8k": {"ann_file": "{root}/captions"},
    "HMDB51": {"annotation_path": "{root}/splits", "frames_per_clip": 2},
    "Kinetics": {"frames_per_clip": 2},
    "PhotoTour": {"name": "liberty"},
    "UCF101": {"annotation_path": "{root}/splits", "frames_per_clip": 2},
}
WITH_ROOT = sorted(
    name
    for name, member in vars(torchvision.datasets).items()
    if name in distill_datasets() and "root" in inspect.signature(member).parameters
)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for module in [m for name, m in sys.modules.items() if name.startswith("torchvision.datasets")]:
        for name in [name for name in vars(module) if name.startswith("download_")]:
            monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def coco_tools(monkeypatch):
    """The one thing CocoDetection needs of pycocotools to find nothing."""

    class COCO:
        def __init__(self, path):
            with open(path):
                pass

    package, module = types.ModuleType("pycocotools"), types.ModuleType("pycocotools.coco")
    module.COCO = COCO
    monkeypatch.setitem(sys.modules, "pycocotools", package)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", module)


def params_for(name, root):
    extra = REQUIRED.get(name, {})
    return {"root": str(root)} | {
        key: value.format(root=root) if isinstance(value, str) else value
        for key, value in extra.items()
    }


def refusal(name, **params):
    with pytest.raises(OSError, match=f"^{name} ") as refused:
        distill_datasets()[name](**params)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", WITH_ROOT)
def test_a_data_set_without_data_is_named_with_the_folder_it_looked_in(name, tmp_path, coco_tools):
    with pytest.raises((OSError, RuntimeError, ModuleNotFoundError)) as refused:
        distill_datasets()[name](**params_for(name, tmp_path))
    text = str(refused.value)
    if refused.type is ModuleNotFoundError:
        assert f"{name} needs the package {refused.value.__cause__.name}: pip install" in text
    elif refused.type is RuntimeError:  # torchvision's words for the same
        assert "needs to have" in text
    else:
        assert text.startswith(f"{name} finds no data: looked ")
        assert str(tmp_path) in text
        assert "\n" not in text
        assert "params.download: true" in text or f"datasets.{name}.html" in text


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_what_is_said_of_a_layout_holds_the_parameters_of_the_class(name):
    factory = distill_datasets()[name]
    known = {key: f"<{key}>" for key in inspect.signature(factory).parameters}
    layout = LAYOUTS[name]
    assert layout.below in known
    assert "{" not in layout.path.format_map(known) + layout.content.format_map(known)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "STL10"])
def test_the_folder_looked_for_is_the_one_the_class_reads(name, tmp_path):
    base_folder = getattr(torchvision.datasets, name).base_folder
    archive = getattr(torchvision.datasets, name).filename
    assert f"looked for {tmp_path / base_folder} (the extracted {archive})" in refusal(
        name, root=str(tmp_path)
    )


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST", "QMNIST"])
def test_the_folder_of_an_mnist_is_the_one_the_class_reads(name, tmp_path):
    assert f"looked for {tmp_path / name / 'raw'} " in refusal(name, root=str(tmp_path))


def test_parameters_are_part_of_what_was_looked_for(tmp_path):
    root = str(tmp_path)
    assert f"{root}/test_32x32.mat" in refusal("SVHN", root=root, split="test")
    assert f"{root}/VOCdevkit/VOC2007 " in refusal("VOCDetection", root=root, year="2007")


def test_imagenet_names_the_archives_it_is_made_of(tmp_path):
    pytest.importorskip("scipy", reason="torchvision's ImageNet reads its archives with scipy")
    root = str(tmp_path)
    text = refusal("ImageNet", root=root, split="val")
    assert f"{root}/val (torchvision makes it, and meta.bin, of ILSVRC2012_devkit_t12" in text
    assert "ILSVRC2012_img_val.tar" in text
    assert "params.download" not in text


def test_image_folder_says_that_it_wants_a_folder_per_class(tmp_path):
    text = refusal("ImageFolder", root=str(tmp_path))
    assert f"looked for {tmp_path}/<class>/*.jpg (one folder of images per class)" in text
    (tmp_path / "cat").mkdir()
    assert "Found no valid file for the classes cat" in refusal("ImageFolder", root=str(tmp_path))


def test_a_root_that_is_not_there_is_said_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"there is no folder {tmp_path / 'data'};" in refusal("CIFAR10", root="data")


def test_a_damaged_file_is_told_from_a_missing_one(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    assert "which is there" not in refusal("CIFAR10", root=str(tmp_path))
    (folder / "data_batch_1").write_bytes(b"half")
    assert "which is there but incomplete or damaged" in refusal("CIFAR10", root=str(tmp_path))


def test_annotations_are_looked_for_where_their_parameter_says(tmp_path, coco_tools):
    text = refusal("CocoDetection", root=str(tmp_path), annFile=str(tmp_path / "a.json"))
    assert f"looked for {tmp_path / 'a.json'} (the JSON file of instances);" in text


@pytest.mark.parametrize("name", WITH_ROOT)
def test_nothing_is_downloaded_unless_the_file_says_so(name):
    parameters = inspect.signature(distill_datasets()[name]).parameters
    assert "download" not in parameters or parameters["download"].default is False


def test_only_the_default_of_download_differs_from_torchvision():
    for name in ("SBU", "SEMEION"):
        ours = inspect.signature(distill_datasets()[name], eval_str=True).parameters
        theirs = inspect.signature(getattr(torchvision.datasets, name), eval_str=True).parameters
        assert list(ours) == list(theirs)
        assert all(ours[key].annotation == theirs[key].annotation for key in theirs)
        assert {key for key in theirs if ours[key].default != theirs[key].default} == {"download"}


def test_a_download_that_fails_says_where_to(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise urllib.request.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    text = refusal("CIFAR10", root=str(tmp_path), download=True)
    assert f"CIFAR10 could not be downloaded to {tmp_path}: <urlopen error no network>" in text


def test_settings_at_fault_are_not_told_as_missing_data(tmp_path):
    with pytest.raises(ValueError, match="Unknown value 'x' for argument split"):
        distill_datasets()["SVHN"](str(tmp_path), split="x")


def test_a_folder_that_may_not_be_read_is_not_told_as_missing(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(torchvision.datasets.ImageFolder, "find_classes", refuse)
    with pytest.raises(PermissionError, match=r"^.Errno 13. Permission denied"):
        distill_datasets()["ImageFolder"](str(tmp_path))


@pytest.mark.parametrize("name", ["EMNIST", "QMNIST", "ImageNet"])
def test_open_keywords_become_the_parameters_of_the_base_class(name, tmp_path):
    factory = distill_datasets()[name]
    binding = bind(factory, params_for(name, tmp_path) | {"downlod": True})
    assert [problem.key for problem in binding.problems] == ["downlod"]
    assert "transform" in inspect.signature(factory).parameters


def test_with_its_files_it_gives_torchvision_s_own_object(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.jpg")
    data = distill_datasets()["ImageFolder"](root=str(tmp_path))
    assert type(data) is torchvision.datasets.ImageFolder
    assert data.classes == ["cat", "dog"]
    assert pickle.loads(pickle.dumps(data))[1][1] == 1


def test_a_factory_is_called_as_its_class_is():
    factory = distill_datasets()["CIFAR10"]
    assert factory.__name__ == "CIFAR10"
    assert factory.__doc__ == torchvision.datasets.CIFAR10.__doc__
    parameters = inspect.signature(factory, eval_str=True).parameters
    assert list(parameters) == ["root", "train", "transform", "target_transform", "download"]
    assert parameters["train"].annotation is bool
    assert bind(factory, {"root": "x", "train": "yes"}).problems[0].key == "train"


def test_a_data_set_that_needs_a_missing_package_names_it(tmp_path):
    class Wants(torchvision.datasets.VisionDataset):
        def __init__(self, root: str):
            import no_such_package  # noqa: F401

    with pytest.raises(ModuleNotFoundError, match=r"^Wants needs the package no_such_package: pip"):
        telling_what_is_missing(Wants)(str(tmp_path))


def test_a_home_folder_is_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"looked for {tmp_path / 'd' / 'food-101'} " in refusal("Food101", root="~/d")
