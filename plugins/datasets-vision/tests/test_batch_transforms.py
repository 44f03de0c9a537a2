import pickle

import pytest
import torch
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from distill_datasets_vision import CutMix, MixUp, MixUpOrCutMix, distill_batch_transforms

CLASSES = 5
OFFERED = [
    MixUp(CLASSES),
    CutMix(CLASSES),
    MixUpOrCutMix(CLASSES, switch_probability=0.0),
    MixUpOrCutMix(CLASSES, switch_probability=1.0),
    MixUpOrCutMix(CLASSES, probability=0.0),
]


def batch(size=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 8, 8, generator=generator)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)


def seeded(transform, images, labels, seed=3):
    torch.manual_seed(seed)
    return transform(images, labels)


def test_mixup_is_the_published_blend_of_a_sample_with_the_one_before_it():
    images, labels = batch()
    mixed, targets = seeded(MixUp(CLASSES, alpha=0.4), images, labels)
    torch.manual_seed(3)
    ratio = torch.distributions.Beta(torch.tensor([0.4]), torch.tensor([0.4])).sample().item()
    assert 0 < ratio < 1
    soft = one_hot(labels, CLASSES).float()
    for i in range(len(images)):
        torch.testing.assert_close(mixed[i], ratio * images[i] + (1 - ratio) * images[i - 1])
        torch.testing.assert_close(targets[i], ratio * soft[i] + (1 - ratio) * soft[i - 1])


def test_cutmix_takes_a_box_of_the_sample_before_and_its_area_of_the_label():
    images, labels = batch()
    soft = one_hot(labels, CLASSES).float()
    areas = set()
    for seed in range(20):
        mixed, targets = seeded(CutMix(CLASSES), images, labels, seed)
        cut = (mixed != images).any(1)
        assert (cut == cut[0]).all()
        rows, columns = cut[0].any(1), cut[0].any(0)
        assert torch.equal(cut[0], rows[:, None] & columns)
        area = cut[0].float().mean().item()
        for i in range(len(images)):
            assert torch.equal(mixed[i][:, cut[i]], images[i - 1][:, cut[i]])
            torch.testing.assert_close(targets[i], (1 - area) * soft[i] + area * soft[i - 1])
        areas.add(area)
    assert len(areas) > 5


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_what_is_mixed_is_torchvision_s(name):
    images, labels = batch()
    ours = seeded(distill_batch_transforms()[name](CLASSES, alpha=0.7), images, labels)
    theirs = seeded(getattr(v2, name)(num_classes=CLASSES, alpha=0.7), images, labels)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("transform", OFFERED)
def test_a_part_of_a_batch_becomes_what_it_becomes_in_the_whole(transform):
    images, labels = batch(7)
    for seed in range(5):
        whole = seeded(transform, images, labels, seed)
        part = seeded(transform, images[2:5], labels[2:5], seed)
        for all_values, values in zip(whole, part, strict=True):
            assert torch.equal(all_values[3:5], values[1:])  # the first lacks the one before it


@pytest.mark.parametrize("transform", OFFERED)
def test_as_much_is_drawn_for_every_size_of_batch(transform):
    following = set()
    for size in (1, 2, 9):
        seeded(transform, *batch(size))
        following.add(torch.rand(()).item())
    assert len(following) == 1


@pytest.mark.parametrize("transform", OFFERED)
def test_targets_are_probabilities_and_the_batch_given_stays_as_it_was(transform):
    images, labels = batch()
    before = images.clone(), labels.clone()
    mixed, targets = transform(images, labels)
    assert mixed.shape == images.shape
    assert (targets.shape, targets.dtype) == ((6, CLASSES), torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert all(map(torch.equal, before, (images, labels)))


@pytest.mark.parametrize("transform", OFFERED)
def test_soft_targets_are_mixed_like_the_labels_they_come_of(transform):
    images, labels = batch()
    soft = one_hot(labels, CLASSES).double()
    kept = soft.clone()
    of_labels = seeded(transform, images, labels)
    of_soft = seeded(transform, images, soft)
    assert torch.equal(of_labels[0], of_soft[0])
    torch.testing.assert_close(of_labels[1].double(), of_soft[1])
    assert torch.equal(soft, kept)


def test_two_in_a_row_mix_what_is_mixed():
    images, labels = batch()
    mixed, targets = CutMix(CLASSES)(*MixUp(CLASSES)(images, labels))
    assert mixed.shape == images.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_one_of_both_is_as_frequent_as_asked_for():
    images, labels = batch()
    transform = MixUpOrCutMix(CLASSES, probability=0.6, switch_probability=0.25)
    torch.manual_seed(0)
    counts = {"neither": 0, "cutmix": 0, "mixup": 0}
    for _ in range(400):
        mixed, _ = transform(images, labels)
        same = (mixed == images).float().mean()
        counts["neither" if same == 1 else "cutmix" if same > 0 else "mixup"] += 1
    # CutMix with an empty or full box counts as another: some of 60.
    assert counts["neither"] == pytest.approx(160, abs=35)
    assert counts["mixup"] == pytest.approx(180, abs=35)
    assert counts["cutmix"] == pytest.approx(60, abs=30)


def test_each_of_both_has_an_alpha_of_its_own():
    images, labels = batch()
    for switch, name, alpha in ((0.0, MixUp, 0.3), (1.0, CutMix, 0.6)):
        both = MixUpOrCutMix(CLASSES, 0.3, 0.6, switch_probability=switch)
        torch.manual_seed(5)
        torch.rand(2)
        expected = name(CLASSES, alpha)(images, labels)
        assert all(map(torch.equal, seeded(both, images, labels, 5), expected))


@pytest.mark.parametrize("transform", OFFERED)
@pytest.mark.parametrize("label", [-1, CLASSES, 200])
def test_a_label_beyond_the_classes_is_named(transform, label):
    images, labels = batch()
    labels[2] = label
    with pytest.raises(ValueError, match=f"a label {label}; with num_classes 5 .* from 0 to 4"):
        transform(images, labels)


@pytest.mark.parametrize("transform", OFFERED)
def test_what_cannot_be_mixed_is_refused(transform):
    images, labels = batch()
    with pytest.raises(ValueError, match=r"images must be floating point.*torch.uint8 \(6, 3, 8"):
        transform((images * 255).byte(), labels)
    with pytest.raises(ValueError, match="one tensor of images, not dict"):
        transform({"image": images}, labels)
    with pytest.raises(ValueError, match="floating point \\(B, C, H, W\\)"):
        transform(images[0], labels)
    with pytest.raises(ValueError, match="one label for each image"):
        transform(images, labels[:3])
    with pytest.raises(ValueError, match="one label for each image"):
        transform(images, None)
    with pytest.raises(ValueError, match="targets have 3 classes, num_classes is 5"):
        transform(images, torch.rand(6, 3))
    with pytest.raises(ValueError, match=r"whole numbers .* torch.float32 \(6,\)"):
        transform(images, labels.float())
    with pytest.raises(ValueError, match=r"these are torch.int64 \(6, 8, 8\)"):
        transform(images, labels[:, None, None].expand(6, 8, 8))


def test_settings_out_of_range_are_refused():
    for make in (MixUp, CutMix):
        with pytest.raises(ValueError, match="alpha is 0: it must be above 0"):
            make(10, alpha=0)
        with pytest.raises(ValueError, match="num_classes is 0"):
            make(0)
    with pytest.raises(ValueError, match="mixup_alpha is -1"):
        MixUpOrCutMix(10, mixup_alpha=-1)
    with pytest.raises(ValueError, match="cutmix_alpha is 0"):
        MixUpOrCutMix(10, cutmix_alpha=0)
    for name in ("probability", "switch_probability"):
        with pytest.raises(ValueError, match=f"^{name} is 1.5: it must be from 0 to 1"):
            MixUpOrCutMix(10, **{name: 1.5})


@pytest.mark.parametrize("transform", OFFERED)
def test_a_batch_transform_can_be_pickled(transform):
    images, labels = batch()
    copy = pickle.loads(pickle.dumps(transform))
    assert all(map(torch.equal, seeded(copy, images, labels), seeded(transform, images, labels)))
