import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from distill import Sample
from distill_datasets_vision import ImageFiles, ImageMaskFolders


def write(path, color=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), color).save(path)


def test_image_files_are_all_images_below_a_folder_in_the_order_of_their_paths(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a.png", "b.png", "a/x/1.png"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = ImageFiles(str(tmp_path))
    assert data.files == ["a/x/1.png", "a.png", "b/10.JPG", "b/2.png", "b.png"]
    assert len(data) == 5


def test_an_item_of_image_files_is_an_rgb_image_without_target(tmp_path):
    write(tmp_path / "1.png", (1, 2, 3))
    write(tmp_path / "2.png", 7, "L")
    data = pickle.loads(pickle.dumps(ImageFiles(str(tmp_path))))
    assert data[0] == Sample(data[0].input, None)
    assert data[0].input.getpixel((0, 0)) == (1, 2, 3)
    assert (data[1].input.mode, data[1].input.getpixel((0, 0))) == ("RGB", (7, 7, 7))


def test_image_files_follow_links_to_folders(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    assert ImageFiles(str(tmp_path / "here")).files == ["link/1.png"]


def test_image_files_say_where_they_found_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x: there is no such folder"):
        ImageFiles("x")
    with pytest.raises(FileNotFoundError, match=rf"images in {tmp_path} \(.jpg, .jpeg"):
        ImageFiles(str(tmp_path))


@pytest.fixture
def pairs(tmp_path):
    write(tmp_path / "images" / "b.jpg")
    write(tmp_path / "images" / "city" / "a.jpg")
    mask = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    (tmp_path / "masks" / "city").mkdir(parents=True)
    mask.save(tmp_path / "masks" / "b.png")
    mask.save(tmp_path / "masks" / "city" / "a.png")
    return tmp_path


def folders(path):
    return ImageMaskFolders(str(path / "images"), str(path / "masks"))


def test_images_and_masks_are_paired_by_their_names(pairs):
    data = pickle.loads(pickle.dumps(folders(pairs)))
    assert data.names == ["b", "city/a"]
    image, mask = data[1]
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert type(mask) is tv_tensors.Mask
    assert mask.dtype == torch.uint8
    assert mask.tolist() == np.arange(24).reshape(4, 6).tolist()


def test_a_palette_image_gives_its_indices(pairs):
    palette = Image.new("P", (6, 4), 3)
    palette.putpalette([200, 100, 50] * 256)
    palette.save(pairs / "masks" / "b.png")
    assert folders(pairs)[0][1].unique().tolist() == [3]


def test_a_mask_in_colours_is_refused_by_name(pairs):
    write(pairs / "masks" / "b.png")
    with pytest.raises(ValueError, match=r"masks/b.png is an image of mode RGB; a mask has one"):
        folders(pairs)[0]


def test_what_has_no_partner_is_named(pairs):
    for number in range(7):
        write(pairs / "images" / f"x{number}.jpg")
    with pytest.raises(
        FileNotFoundError,
        match=rf"7 images without mask in {pairs}/masks: x0, x1, x2, x3, x4, \.\.\.$",
    ):
        folders(pairs)
    for number in range(8):
        write(pairs / "masks" / f"x{number}.png", 0, "L")
    with pytest.raises(FileNotFoundError, match=r"1 mask without image in .*/images: x7$"):
        folders(pairs)


def test_two_files_of_one_name_are_refused(pairs):
    write(pairs / "images" / "b.png")
    with pytest.raises(ValueError, match=r"images/b\.\w+ and .*images/b\.\w+ have the same name"):
        folders(pairs)


def test_a_missing_folder_of_masks_is_named(pairs):
    with pytest.raises(FileNotFoundError, match=r"ImageMaskFolders finds no data: .*/none: there"):
        ImageMaskFolders(str(pairs / "images"), str(pairs / "none"))
