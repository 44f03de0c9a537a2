"""A named data set with its transforms: what one sample is."""

import pytest
import torch

from distill import DataError, Sample, Views
from distill.data.source import Source
from distill.testing import ToyData


def numbers(size):
    """Sample ``n`` is the number n, its target too."""
    return [(torch.tensor(float(n)), n) for n in range(size)]


def refuse_two(value):
    if value == 2:
        raise ValueError("cannot be decoded")
    return value


class Broken:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        raise OSError("the file is damaged")


def test_a_source_tells_its_classes_if_the_data_set_does():
    assert Source("toy", ToyData(4, classes=2)).classes == ["class 0", "class 1"]
    assert Source("n", numbers(4)).classes is None
    odd = ToyData(4)
    odd.classes = 10
    assert Source("n", odd).classes is None
    odd.classes = [0, 1]
    assert Source("n", odd).classes is None


def test_it_is_as_long_as_its_data_set():
    assert len(Source("n", numbers(4))) == 4


def test_a_pair_becomes_a_sample_with_its_index():
    sample = Source("n", numbers(4)).read(3)
    assert sample == Sample(torch.tensor(3.0), 3, index=3)


def test_a_sample_keeps_its_extras_and_is_given_its_index():
    given = Sample(torch.ones(()), 4, extras={"views": 2})
    sample = Source("s", [given], [lambda value: value * 3]).read(0)
    assert sample == Sample(torch.tensor(3.0), 4, index=0, extras={"views": 2})
    assert given.index == -1


def test_joint_transforms_come_first_and_change_input_and_target_together():
    def swap(value, target):
        return torch.tensor(float(target) + 10), int(value)

    def shift(value, target):
        return value + 1, target + 1

    source = Source("n", [(torch.tensor(2.0), 5)], [lambda v: v * 2], [swap, shift])
    sample = source.read(0)
    assert (sample.input.item(), sample.target) == (32.0, 3)


def test_an_error_of_the_data_set_names_data_set_and_sample():
    with pytest.raises(DataError) as caught:
        Source("photos", Broken()).read(3)
    assert str(caught.value) == (
        "data set 'photos': sample 3 cannot be read: OSError: the file is damaged"
    )
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("joint", [False, True])
def test_an_error_of_a_transform_names_data_set_and_sample(joint):
    plain, both = [refuse_two], [lambda value, target: (refuse_two(value), target)]
    source = Source("photos", numbers(6), [] if joint else plain, both if joint else [])
    assert source.read(1).target == 1
    with pytest.raises(DataError, match=r"'photos': sample 2 .*ValueError: cannot be decoded"):
        source.read(2)


def test_views_of_a_sample_are_transformed_each_by_itself():
    drawn = iter(range(10))
    given = Sample(Views((torch.zeros(()), torch.ones(()))), 4)
    source = Source("s", [given], [lambda value: value * 10, lambda value: value + next(drawn)])
    sample = source.read(0)
    assert isinstance(sample.input, Views)
    assert [view.item() for view in sample.input] == [0.0, 11.0]
