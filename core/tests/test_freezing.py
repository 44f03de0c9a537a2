import pytest
import torch
from torch import nn

from distill import DistillError
from distill.testing import ToyConvNet, ToyMLP
from distill.training.freezing import Unchanged, frozen_parameters


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


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("student", ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight"]),
        ("student.conv", ["conv.weight", "conv.bias"]),
        ("BatchNorm2d", ["norm.weight", "norm.bias"]),
        ("ToyConvNet", ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight"]),
    ],
)
def test_an_entry_means_a_module_by_path_or_all_of_a_class(entry, expected):
    model = ToyConvNet()
    model.head.bias = None
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = frozen_parameters(entry, {"student": model, "regressor": nn.Linear(2, 2)})
    assert [names[id(p)] for p in chosen] == expected


def test_an_entry_may_mean_an_auxiliary_module():
    regressor = nn.Linear(2, 2)
    chosen = frozen_parameters("regressor", {"student": ToyMLP(), "regressor": regressor})
    assert [id(p) for p in chosen] == [id(p) for p in regressor.parameters()]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("student.haed", "ToyMLP has no module 'haed'; did you mean head"),
        (
            "Liner",
            "'Liner' is neither a module nor a class of one that trains; did you mean Linear",
        ),
        ("zzz", r"\(modules: student\)"),
    ],
)
def test_an_entry_that_means_nothing_is_answered_with_the_nearest(entry, message):
    with pytest.raises(DistillError, match=message):
        frozen_parameters(entry, {"student": ToyMLP()})


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
