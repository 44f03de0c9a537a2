import pytest
import torch
from torch import nn

from distill import load
from distill.errors import UsageError
from distill.inspection import inspect_model, models_of_file, named_model, table
from distill.registry import Entry, Registry
from distill.testing import ToyConvNet, ToyMLP


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return {"out": self.shared(self.shared(x)), "in": x}


class Reader(nn.Module):
    """Cannot be run without memory."""

    def forward(self, x):
        return x * float(x.sum())


class Refuses(nn.Module):
    def forward(self, x):
        raise AssertionError("wrong height")


def rows(inspected):
    return {row.path: (row.kind, row.output, row.input, row.parameters) for row in inspected.rows}


def test_every_module_is_shown_with_its_shapes_and_parameters():
    inspected = inspect_model("mlp", ToyMLP(hidden=6), torch.zeros(2, 4))
    assert (inspected.inputs, inspected.output) == ("(2, 4)", "(2, 3)")
    assert rows(inspected) == {
        "body": ("Sequential", "(2, 6)", "(2, 4)", 30),
        "body.0": ("Linear", "(2, 6)", "(2, 4)", 30),
        "body.1": ("ReLU", "(2, 6)", "(2, 6)", 0),
        "dropout": ("Dropout", "(2, 6)", "(2, 6)", 0),
        "head": ("Linear", "(2, 3)", "(2, 6)", 21),
    }


def test_a_module_that_runs_twice_or_never_says_so():
    inspected = inspect_model("twice", Twice(), torch.zeros(2, 4))
    assert [rows(inspected)[f"shared@{n}"][1] for n in (0, 1)] == ["(2, 4)", "(2, 4)"]
    assert rows(inspected)["idle"][1] == "did not run"
    assert inspected.output == "{out: (2, 4), in: (2, 4)}"


def test_the_hooks_are_gone_afterwards_even_after_a_failure():
    model = ToyMLP()
    inspect_model("mlp", model, torch.zeros(2, 4))
    with pytest.raises(UsageError, match=r"mlp cannot take inputs \(2, 5\): .*mat1 and mat2"):
        inspect_model("mlp", model, torch.zeros(2, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_named_model_is_built_with_its_parameters(registry):
    inspected = named_model(registry, "ToyConvNet", ["width=5"], [1, 8, 8])
    assert rows(inspected)["conv"] == ("Conv2d", "(2, 5, 8, 8)", "(2, 1, 8, 8)", 50)


@pytest.mark.parametrize(
    ("name", "params", "shape", "said"),
    [
        ("ToyMLP", [], None, "give the shape of one input"),
        ("ToyMLP", ["hiden=3"], [4], "there is no parameter 'hiden'; did you mean hidden?"),
        ("ToyMLP", ["hidden=x"], [4], "expected a whole number, got the text 'x'"),
        ("ToyMLP", ["hidden=-3"], [4], "ToyMLP cannot be built: "),
        ("open_ended", ["x=1"], [4], "open_ended cannot be built: "),
    ],
)
def test_what_cannot_be_inspected_is_told_in_words(registry, name, params, shape, said):
    with pytest.raises(UsageError) as caught:
        named_model(registry, name, params, shape)
    assert said in str(caught.value)


def test_a_model_that_needs_values_is_run_with_them():
    registry = Registry([Entry("models", "Reader", Reader, "here")])
    assert named_model(registry, "Reader", [], [4]).output == "(2, 4)"


def test_a_model_that_refuses_its_inputs_is_told_in_words():
    registry = Registry([Entry("models", "Refuses", Refuses, "here")])
    with pytest.raises(UsageError, match=r"Refuses cannot take inputs \(2, 4\): wrong height"):
        named_model(registry, "Refuses", [], [4])


def test_models_of_a_file_take_the_shape_of_its_data(tmp_path, experiment_text, registry):
    (tmp_path / "exp.yaml").write_text(experiment_text)
    experiment = load(tmp_path / "exp.yaml")
    wide, thin = models_of_file(experiment, registry, None, None)
    assert (wide.name, thin.name) == ("wide", "thin")
    assert wide.inputs == "(2, 4)"
    assert rows(thin)["body"][1] == "(2, 4)"
    (only,) = models_of_file(experiment, registry, "thin", [4])
    assert only.name == "thin"
    with pytest.raises(UsageError, match=r"there is no model 'thn' in .*exp.yaml; did you mean"):
        models_of_file(experiment, registry, "thn", None)


def test_the_table_has_aligned_columns_and_a_heading():
    model = ToyConvNet()
    text = table(inspect_model("net", model, torch.zeros(2, 1, 4, 4)))
    first, header, *lines = text.splitlines()
    assert first == "net: (2, 1, 4, 4) -> (2, 3)"
    assert header.split() == ["path", "class", "output", "input", "parameters"]
    assert len({len(line) for line in (header, *lines)}) == 1
    assert lines[0].split()[0] == "conv"


def test_a_model_is_inspected_without_memory_where_it_can_be():
    devices = []

    class Watched(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            devices.append(self.weight.device.type)

    registry = Registry([Entry("models", "Watched", Watched, "here")])
    assert named_model(registry, "Watched", [], [4]).output == "(2, 3)"
    assert devices == ["meta"]
