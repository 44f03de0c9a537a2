"""That frozen teachers stay as they are."""

import pytest
import torch
from torch import nn

from distill.testing import ToyConvNet, ToyMLP
from distill.training.frozen_teachers import Unchanged


class Counting(nn.Module):
    """A model that counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, inputs):
        self.calls += 1
        return self.layer(inputs)


def watch(teacher, mode="eval"):
    return Unchanged({"teacher": teacher}, {"teacher": mode})


def test_a_teacher_that_only_answers_is_unchanged():
    teacher = ToyConvNet().eval()
    check = watch(teacher)
    teacher(torch.randn(2, 1, 4, 4))
    assert check.changed() == []


def test_a_teacher_that_counts_its_forwards_is_noticed():
    teacher = Counting().eval()
    check = watch(teacher)
    teacher(torch.randn(2, 4))
    assert check.changed() == ["teacher"]


def test_a_parameter_changed_behind_autograds_back_is_noticed():
    teacher = ToyMLP()
    check = watch(teacher)
    teacher.head.bias.data[1] += 1e-6
    assert check.changed() == ["teacher"]


def test_running_statistics_may_change_in_train_mode_and_weights_may_not():
    teacher = ToyConvNet().train()
    check = watch(teacher, "train")
    teacher(torch.randn(2, 1, 4, 4))
    assert check.changed() == []
    teacher.conv.weight.data.mul_(2)
    assert check.changed() == ["teacher"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_buffers_of_any_type_are_watched(dtype):
    teacher = nn.Module()
    teacher.register_buffer("state", torch.zeros((), dtype=dtype))
    check = watch(teacher)
    assert check.changed() == []
    teacher.state.fill_(1)
    assert check.changed() == ["teacher"]


def test_teachers_are_told_apart():
    teachers = {"old": ToyMLP(), "new": ToyMLP()}
    check = Unchanged(teachers, {"old": "eval", "new": "eval"})
    teachers["new"].head.bias.data[0] += 1
    assert check.changed() == ["new"]
