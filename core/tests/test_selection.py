"""Which parameters an entry of the file means."""

import pytest
from torch import nn

from distill import DistillError
from distill.testing import ToyConvNet, ToyMLP
from distill.training.selection import select_parameters

CONV, NORM = ["conv.weight", "conv.bias"], ["norm.weight", "norm.bias"]


class Normalized(nn.Module):
    """Has a layer of every kind that normalizes, and one that is only called so."""

    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm1d(4)
        self.layer = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.root = nn.RMSNorm(4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.norm_like = nn.Linear(4, 4)


def chosen(entry, **trained):
    names = {id(p): f"{o}.{n}" for o, m in trained.items() for n, p in m.named_parameters()}
    return [names[id(parameter)] for parameter in select_parameters(entry, trained)]


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
    chosen = select_parameters(entry, {"student": model, "regressor": nn.Linear(2, 2)})
    assert [names[id(p)] for p in chosen] == expected


def test_an_entry_may_mean_an_auxiliary_module():
    regressor = nn.Linear(2, 2)
    chosen = select_parameters("regressor", {"student": ToyMLP(), "regressor": regressor})
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
        select_parameters(entry, {"student": ToyMLP()})


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("student.head.bias", ["student.head.bias"]),
        ("student.*.bias", ["student.body.0.bias", "student.head.bias"]),
        ("*.weight", ["student.body.0.weight", "student.head.weight", "regressor.weight"]),
        ("student.body.[0-9].weight", ["student.body.0.weight"]),
        ("bias", ["student.body.0.bias", "student.head.bias", "regressor.bias"]),
        ("regressor.weight", ["regressor.weight"]),
        (
            "*",
            [f"student.body.0.{n}" for n in ("weight", "bias")]
            + [f"student.head.{n}" for n in ("weight", "bias")]
            + [f"regressor.{n}" for n in ("weight", "bias")],
        ),
    ],
)
def test_an_entry_may_mean_parameters_by_name_or_pattern(entry, expected):
    assert chosen(entry, student=ToyMLP(), regressor=nn.Linear(2, 2)) == expected


def test_norm_means_the_parameters_of_every_layer_that_normalizes():
    layers = ("batch", "layer", "group", "instance")
    expected = {f"student.{name}.{part}" for name in layers for part in ("weight", "bias")}
    assert set(chosen("norm", student=Normalized())) == {*expected, "student.root.weight"}


def test_a_term_of_the_criterion_is_named_with_its_section():
    term = nn.Linear(2, 2)
    trained = {"student": ToyMLP(), "criterion.hint": term}
    assert select_parameters("criterion.hint", trained) == list(term.parameters())
    assert select_parameters("criterion.hint.bias", trained) == [term.bias]


def test_a_pattern_that_fits_no_name_is_answered_with_what_there_is():
    said = r"no parameter's name fits 'teacher\.\*' \(they are called: student\.body\.0\.weight, "
    with pytest.raises(DistillError, match=said):
        select_parameters("teacher.*", {"student": ToyMLP()})


@pytest.mark.parametrize("entry", ["student.*.bais", "student.head.*.weight", "student.b?dy"])
def test_a_pattern_of_a_known_owner_that_fits_no_name_is_an_error(entry):
    with pytest.raises(DistillError):
        select_parameters(entry, {"student": ToyMLP()})


def test_a_module_is_meant_whole_though_its_path_begins_another_owners_name():
    trained = {"student": ToyMLP(), "student2": nn.Linear(2, 2)}
    assert select_parameters("student2", trained) == list(trained["student2"].parameters())
    assert len(select_parameters("student", trained)) == 4
