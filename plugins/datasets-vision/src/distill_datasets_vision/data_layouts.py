"""Where torchvision's data sets look for their files, to be told when these are missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What a data set wants to find.

    Attributes:
        path: below the folder (or file) that the parameter ``below`` gives; ``{split}`` and the
            like stand for the data set's parameters.
        content: what that is, to be read after the path.
        below: name of that parameter.
    """

    path: str
    content: str
    below: str = "root"


_UBYTE = "the extracted files *-images-idx3-ubyte and *-labels-idx1-ubyte"
_VOC = "the extracted VOCtrainval tar of that year; 2011 below TrainVal"
_LFW = "lfw*.tgz, extracted beside it, and the lists pairs*.txt or people*.txt"
_CLASSES = "one folder of {} per class"

LAYOUTS = {
    "CIFAR10": Layout("cifar-10-batches-py", "the extracted cifar-10-python.tar.gz"),
    "CIFAR100": Layout("cifar-100-python", "the extracted cifar-100-python.tar.gz"),
    "CLEVRClassification": Layout("clevr/CLEVR_v1.0", "the extracted CLEVR_v1.0.zip"),
    "Caltech101": Layout("caltech101/101_ObjectCategories", "from the archive caltech-101.zip"),
    "Caltech256": Layout(
        "caltech256/256_ObjectCategories", "the extracted 256_ObjectCategories.tar"
    ),
    "CelebA": Layout(
        "celeba",
        "img_align_celeba, extracted, identity_CelebA.txt and the files list_*.txt",
    ),
    "Cityscapes": Layout(
        "leftImg8bit/{split}", "with gtFine or gtCoarse beside leftImg8bit, or the zips of both"
    ),
    "CocoCaptions": Layout("", "the JSON file of captions", "annFile"),
    "CocoDetection": Layout("", "the JSON file of instances", "annFile"),
    "Country211": Layout("country211/{split}", "from the archive country211.tgz"),
    "DTD": Layout("dtd/dtd", "dtd-r1.0.1.tar.gz, extracted into the folder dtd"),
    "EMNIST": Layout("EMNIST/raw", "the extracted files emnist-{split}-* of gzip.zip"),
    "EuroSAT": Layout("eurosat/2750", "EuroSAT.zip, extracted into the folder eurosat"),
    "FER2013": Layout("fer2013", "fer2013.csv, icml_face_data.csv, or train.csv and test.csv"),
    "FGVCAircraft": Layout("fgvc-aircraft-2013b", "the extracted fgvc-aircraft-2013b.tar.gz"),
    "FashionMNIST": Layout("FashionMNIST/raw", _UBYTE),
    "Flickr30k": Layout("", "the file of captions", "ann_file"),
    "Flickr8k": Layout("", "the file of captions", "ann_file"),
    "Flowers102": Layout(
        "flowers-102", "jpg from 102flowers.tgz, with imagelabels.mat and setid.mat"
    ),
    "Food101": Layout("food-101", "the extracted food-101.tar.gz"),
    "GTSRB": Layout("gtsrb/GTSRB", "the GTSRB archives, extracted into the folder gtsrb"),
    "HMDB51": Layout("<class>/*.avi", _CLASSES.format("videos")),
    "INaturalist": Layout("{version}", "the extracted archive of that version"),
    "ImageFolder": Layout("<class>/*.jpg", _CLASSES.format("images")),
    "ImageNet": Layout(
        "{split}",
        "torchvision makes it, and meta.bin, of ILSVRC2012_devkit_t12.tar.gz and "
        "ILSVRC2012_img_{split}.tar in the root folder",
    ),
    "Imagenette": Layout("imagenette2*", "the extracted archive of that size"),
    "KMNIST": Layout("KMNIST/raw", _UBYTE),
    "Kinetics": Layout("{split}/<class>/*.mp4", _CLASSES.format("videos")),
    "Kitti": Layout("Kitti/raw", "training and testing with image_2 and label_2"),
    "LFWPairs": Layout("lfw-py", _LFW),
    "LFWPeople": Layout("lfw-py", _LFW),
    "MNIST": Layout("MNIST/raw", _UBYTE),
    "MovingMNIST": Layout("MovingMNIST/mnist_test_seq.npy", "a single file, as downloaded"),
    "Omniglot": Layout(
        "omniglot-py", "images_background.zip or images_evaluation.zip, extracted beside"
    ),
    "OxfordIIITPet": Layout(
        "oxford-iiit-pet", "the extracted images.tar.gz and annotations.tar.gz"
    ),
    "PCAM": Layout("pcam", "the extracted files camelyonpatch_level_2_split_*.h5"),
    "PhotoTour": Layout("{name}", "the extracted {name}.zip"),
    "Places365": Layout(
        "categories_places365.txt", "with the lists of files and the extracted images beside it"
    ),
    "QMNIST": Layout("QMNIST/raw", "the extracted files qmnist-*-idx3-ubyte and -idx2-int"),
    "RenderedSST2": Layout("rendered-sst2", "the extracted rendered-sst2.tgz"),
    "SBDataset": Layout("{image_set}.txt", "with cls, img and inst beside it, of benchmark.tgz"),
    "SBU": Layout("dataset", "of SBUCaptionedPhotoDataset.tar.gz, which is to lie beside it"),
    "SEMEION": Layout("semeion.data", "a single file, as downloaded"),
    "STL10": Layout("stl10_binary", "the extracted stl10_binary.tar.gz"),
    "SUN397": Layout("SUN397", "the extracted SUN397.tar.gz"),
    "SVHN": Layout("{split}_32x32.mat", "a single file, as downloaded"),
    "StanfordCars": Layout(
        "stanford_cars", "devkit, cars_train, cars_test and cars_test_annos_withlabels.mat"
    ),
    "UCF101": Layout("<class>/*.avi", _CLASSES.format("videos")),
    "VOCDetection": Layout("VOCdevkit/VOC{year}", _VOC),
    "VOCSegmentation": Layout("VOCdevkit/VOC{year}", _VOC),
    "WIDERFace": Layout("widerface", "the extracted WIDER_*.zip and wider_face_split.zip"),
}
"""By name of the data set; the others are told as torchvision itself tells them."""
