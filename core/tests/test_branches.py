"""Branches of a model that lead to nothing asked of it."""

import random
from collections import namedtuple

import pytest
import torch
from torch import nn

from distill import Batch
from distill.model.branches import Untraceable, without_side_branches
from distill.model.criterion import Criterion
from distill.model.distiller import Distiller
from distill.model.wiring import Address, Call

INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Outputs = namedtuple("Outputs", ["logits", "side"])


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.count = nn.Linear(4, 4), 0

    def forward(self, x):
        self.count += 1
        return self.layer(x)


class Branching(nn.Module):
    """A side branch in the middle, given out beside the logits while it trains."""

    def __init__(self, form="dict"):
        super().__init__()
        self.first, self.side, self.last, self.head = (Counting() for _ in range(4))
        self.form = form

    def forward(self, x, scale=None):
        x = self.first(x)
        side = self.side(x) if self.training else None
        x = self.last(x).relu_()
        x = self.head(x if scale is None else x * scale)
        if self.form == "dict":
            return {"out": x, "aux": side}
        return Outputs(x, side) if self.form == "named" else (x, side)

    def counts(self):
        return [m.count for m in (self.first, self.side, self.last, self.head)]


class Mean(nn.Module):
    def forward(self, value):
        return value.square().mean()


def student_of(model, text, value, *keys, captured=()):
    call = Call("term", Mean(), {"value": Address(text, value, keys)})
    return Distiller(
        model,
        {},
        [],
        Criterion([call], {"term": 1.0}),
        {"student": list(captured)} if captured else {},
    )


def cut(distiller, mode=True):
    batch = Batch(INPUTS, None, torch.arange(5))
    distiller.train(mode)
    distiller.run_model("student", batch)
    distiller.cut(batch)
    for module in distiller.student.modules():
        module.count = 0
    return batch


@pytest.mark.parametrize(("form", "key"), [("dict", "out"), ("tuple", "0"), ("named", "0")])
def test_a_part_of_the_output_that_is_not_asked_for_is_not_computed(form, key):
    model = Branching(form)
    distiller = student_of(model, f"student.{key}", "student", key)
    batch = cut(distiller)
    distiller(batch)["total"].backward()
    assert model.counts() == [1, 0, 1, 1]
    assert distiller.branches == {"student": ("side",)}
    assert distiller.untraced == {}
    cut_gradient = model.first.layer.weight.grad.clone()
    model.zero_grad()
    output = model(INPUTS)
    (output["out"] if form == "dict" else output[0]).square().mean().backward()
    assert torch.equal(model.first.layer.weight.grad, cut_gradient)


def test_a_branch_before_the_captured_layer_is_not_computed():
    model = Branching()
    distiller = student_of(model, "student.last", "student.last", captured=["last"])
    batch = cut(distiller)
    value = distiller(batch)["term"]
    assert model.counts() == [1, 0, 1, 0]
    assert torch.equal(value, model.last(model.first(INPUTS)).square().mean())


def test_the_model_itself_is_left_as_it_is():
    model = Branching()
    distiller = student_of(model, "student.out", "student", "out")
    cut(distiller)
    assert set(model(INPUTS)) == {"out", "aux"}
    assert model(INPUTS)["aux"] is not None
    names = [name for name, _ in distiller.named_parameters()]
    assert len(names) == len(set(names)) == 8


def test_where_all_of_the_output_is_asked_for_nothing_is_looked_for():
    model = Branching()
    distiller = student_of(model, "student", "student")
    distiller.train()
    distiller.run_model("student", Batch(INPUTS, None, torch.arange(5)))
    distiller.cut(Batch(INPUTS, None, torch.arange(5)))
    assert model.counts() == [1, 1, 1, 1]
    assert distiller.branches == {}


def test_a_row_of_modules_has_no_side_branches():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert without_side_branches(model, ["1"], []) is None


def test_in_eval_mode_the_branches_of_eval_mode_count():
    model = Branching().eval()
    assert without_side_branches(model, ["last"], []) is None


class Drawing(Branching):
    """Leaves a layer out at random."""

    def forward(self, x, scale=None):
        side = self.side(x)
        x = self.first(x) if random.random() < 2 else x
        return {"out": self.head(x), "aux": side}


class Deciding(Branching):
    """Goes another way for other values."""

    def forward(self, x, scale=None):
        side = self.side(x)
        x = self.first(x) if x.sum() > 0 else self.last(x)
        return {"out": self.head(x), "aux": side}


class Coding(Branching):
    """Has a part whose name torch.fx keeps for itself."""

    def __init__(self):
        super().__init__()
        self.code = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x, scale=None):
        return {"out": self.head(self.code[0](self.first(x))), "aux": self.side(x)}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Drawing, "draws random numbers"), (Deciding, "control flow"), (Coding, "Code has not been")],
)
def test_a_forward_that_cannot_be_followed_is_left_alone_with_the_reason(kind, reason):
    model = kind()
    distiller = student_of(model, "student.out", "student", "out")
    batch = cut(distiller)
    distiller(batch)
    assert model.side.count == 1
    assert reason in distiller.untraced["student"]
    with pytest.raises(Untraceable, match=reason):
        without_side_branches(model, [], ["out"])


class Remembering(Branching):
    """A forward whose trace is not what it does: it counts in Python."""

    calls = 0

    def forward(self, x, scale=None):
        self.calls += 1
        return {"out": self.head(self.first(x)) * self.calls, "aux": self.side(x)}


def test_a_trace_that_gives_other_values_is_not_used():
    model = Remembering()
    distiller = student_of(model, "student.out", "student", "out")
    batch = cut(distiller)
    before = model.calls
    distiller(batch)
    assert model.calls == before + 1
    assert "is not what it gives" in distiller.untraced["student"]


def test_tracing_leaves_no_placeholders_in_the_model():
    model = Remembering()
    without_side_branches(model, [], ["out"])
    assert model.calls == 0


def test_what_changes_a_value_in_place_is_kept():
    class InPlace(Branching):
        def forward(self, x, scale=None):
            x = self.first(x)
            side = self.side(x)
            x.add_(1.0)
            return {"out": self.head(x), "aux": side}

    model = InPlace()
    less = without_side_branches(model, [], ["out"])
    assert less.left_out == ("side",)
    assert torch.equal(less.module(INPUTS)["out"], model(INPUTS)["out"])


def test_dropout_in_a_branch_that_is_left_out_does_not_matter():
    class Dropping(Branching):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, scale=None):
            x = self.first(x)
            side = self.side(self.drop(x))
            return {"out": self.head(self.drop(x)), "aux": side}

    distiller = student_of(Dropping(), "student.out", "student", "out")
    cut(distiller)
    assert distiller.branches == {"student": ("side",)}
    assert distiller.student.drop.training


def test_a_captured_module_and_one_inside_of_it_do_not_hide_the_branch():
    class Nested(Branching):
        def __init__(self):
            super().__init__()
            self.row = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x, scale=None):
            x = self.first(x)
            side = self.side(x)
            return {"out": self.head(self.row(x)), "aux": side}

    distiller = student_of(Nested(), "student.row", "student.row", captured=["row", "row.0"])
    distiller.criterion.calls += (Call("inner", Mean(), {"value": Address("i", "student.row.0")}),)
    cut(distiller)
    assert distiller.branches == {"student": ("side",)}
