# ruff: noqa: UP007, UP045 - libraries write their hints in the old form too
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
import torch

from distill.signature import bind, show, wired_parameters


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
    DEFAULT = "g"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def taking(hint):
    """A factory whose one parameter has the hint."""

    def factory(value):
        return value

    factory.__annotations__ = {"value": hint}
    return factory


CONVERTED = [
    (Any, "x", "x"),
    (int, 3, 3),
    (float, 3, 3),
    (float, 0.5, 0.5),
    (bool, True, True),
    (str, "x", "x"),
    (Path, "a/b", Path("a/b")),
    (str | Path, "a/b", "a/b"),
    (list, [1, 2], [1, 2]),
    (set[int], [1, 2], {1, 2}),
    (tuple, [1, 2], (1, 2)),
    (tuple[int, int], [1, 2], (1, 2)),
    (tuple[float, ...], [1, 2, 3], (1, 2, 3)),
    (list[tuple[int, int]], [[1, 2], [3, 4]], [(1, 2), (3, 4)]),
    (Sequence[float], [1, 0.5], [1, 0.5]),
    (Iterable[int], [1], [1]),
    (dict, {"a": 1}, {"a": 1}),
    (Mapping[str, int], {"a": 1}, {"a": 1}),
    (Optional[int], None, None),
    (Optional[int], 3, 3),
    (int | None, None, None),
    (Union[int, str], "x", "x"),
    (float | tuple[float, float], [1, 2], (1, 2)),
    (int | tuple[int, int], 3, 3),
    (torch.dtype | dict, "float16", torch.float16),
    (Literal["mean", "sum"], "sum", "sum"),
    (Annotated[int, "a note"], 3, 3),
    (Colour, "RED", Colour.RED),
    (Colour, "red", Colour.RED),
    (Colour, "g", Colour.GREEN),
    (Colour, "Colour.RED", Colour.RED),
    (Colour, "DEFAULT", Colour.GREEN),
    (Level, 2, Level.HIGH),
    (Colour | None, "GREEN", Colour.GREEN),
    (torch.dtype, "float32", torch.float32),
    (torch.dtype, "torch.uint8", torch.uint8),
    (Callable[..., Any], "relu", "relu"),
]


@pytest.mark.parametrize(("hint", "given", "converted"), CONVERTED)
def test_a_value_becomes_what_the_hint_asks_for(hint, given, converted):
    binding = bind(taking(hint), {"value": given})
    assert binding.problems == []
    assert binding.arguments == {"value": converted}
    assert type(binding.arguments["value"]) is type(converted)


MISFITS = [
    (int, True, "expected a whole number, got true"),
    (int, 1.0, "expected a whole number, got the number 1.0"),
    (int, "3", "expected a whole number, got the text '3'"),
    (float, False, "expected a number, got false"),
    (float, "1e-3x", "expected a number, got the text '1e-3x'"),
    (bool, 1, "expected true or false, got the number 1"),
    (bool, "yes", "expected true or false, got the text 'yes'"),
    (str, 5, "expected text, got the number 5"),
    (Path, 5, "expected text, got the number 5"),
    (int, None, "expected a whole number, got nothing"),
    (int, [1], "expected a whole number, got the list [1]"),
    (int, {}, "expected a whole number, got a mapping"),
    (list, 5, "expected a list, got the number 5"),
    (list[int], ["a"], "expected a list of whole numbers, got the list ['a']"),
    (tuple[int, int], [1], "expected a list of 2 whole numbers, got the list [1]"),
    (list[tuple[int, int]], [1], "expected a list of lists of 2 whole numbers, got the list [1]"),
    (list[str], [1], "expected a list of text, got the list [1]"),
    (list[int], "a", "expected a list of whole numbers, got the text 'a'"),
    (list[int], ["long text"] * 9, "expected a list of whole numbers, got a list"),
    (tuple[int, int], 5, "expected a list of 2 whole numbers, got the number 5"),
    (dict, [1], "expected a mapping, got the list [1]"),
    (Mapping[str, int], 1, "expected a mapping, got the number 1"),
    (Optional[int], "x", "expected a whole number or nothing, got the text 'x'"),
    (int | str, True, "expected a whole number or text, got true"),
    (Literal["mean", "sum"], "summ", "expected one of mean, sum, got the text 'summ'"),
    (Literal[0, 1], True, "expected one of 0, 1, got true"),
    (Colour, "GREN", "expected one of RED, GREEN, DEFAULT, got the text 'GREN'; did you mean"),
    (Colour, "Other.RED", "expected one of RED, GREEN, DEFAULT, got the text 'Other.RED'"),
    (Level, True, "expected one of LOW, HIGH, got true"),
    (torch.dtype, "float31", "expected a type such as float32 or uint8, got the text 'float31'"),
    (torch.dtype, "nn", "expected a type such as float32 or uint8, got the text 'nn'"),
    (torch.dtype, 32, "expected a type such as float32 or uint8, got the number 32"),
    (torch.Tensor, 5, "expected a list of numbers, got the number 5"),
    (torch.Tensor, ["a"], "expected a list of numbers, got the list ['a']"),
    (torch.Tensor, [[1, 2], [3]], "expected a list of numbers, got the list [[1, 2], [3]]"),
]


@pytest.mark.parametrize(("hint", "given", "said"), MISFITS)
def test_a_value_that_does_not_fit_is_a_problem_in_words(hint, given, said):
    (problem,) = bind(taking(hint), {"value": given}).problems
    assert problem.key == "value"
    assert problem.message.startswith(said)


def test_a_list_becomes_a_tensor_of_floats_as_losses_want_it():
    binding = bind(torch.nn.CrossEntropyLoss, {"weight": [1, 1, 2]})
    assert binding.problems == []
    loss = torch.nn.CrossEntropyLoss(**binding.arguments)
    assert torch.isfinite(loss(torch.zeros(2, 3), torch.tensor([0, 2])))


def build(first, lr: float, *, steps: int = 1, decay: bool = False):
    """A factory whose first argument core gives."""


def test_unknown_parameters_are_answered_with_the_nearest_or_all():
    near, far = bind(build, {"lr": 1, "step": 1, "zzzz": 1}, provided=1).problems
    assert (near.key, near.message) == ("step", "there is no parameter 'step'; did you mean steps?")
    assert far.message == "there is no parameter 'zzzz' (known: lr, steps, decay)"


def test_what_core_provides_is_no_parameter_of_the_file():
    (problem,) = bind(build, {"lr": 1, "first": 1}, provided=1).problems
    assert problem.message == "there is no parameter 'first' (known: lr, steps, decay)"


def test_a_missing_parameter_is_a_problem_without_key():
    (problem,) = bind(build, {}, provided=1).problems
    assert (problem.key, problem.message) == ("", "the parameter 'lr' is missing")


def test_a_misspelt_required_parameter_is_one_problem():
    (problem,) = bind(build, {"lrr": 1}, provided=1).problems
    assert problem.message == "there is no parameter 'lrr'; did you mean lr?"


def test_a_factory_with_kwargs_takes_any_name():
    def factory(size: int, **more):
        pass

    binding = bind(factory, {"size": 1, "other": "x"})
    assert binding.problems == []
    assert binding.arguments == {"size": 1, "other": "x"}
    assert len(bind(factory, {"size": "x", "other": 1}).problems) == 1


def test_a_factory_without_parameters_says_so():
    (problem,) = bind(lambda: None, {"size": 1}).problems
    assert problem.message == "there is no parameter 'size' (known: none)"


def test_hints_as_text_are_understood_where_their_names_exist():
    def factory(size: "int"):
        pass

    def typed_only(size: "Unheard"):  # noqa: F821
        pass

    assert len(bind(factory, {"size": "x"}).problems) == 1
    assert bind(typed_only, {"size": "x"}).arguments == {"size": "x"}


def test_all_problems_come_at_once():
    assert len(bind(build, {"steps": "x", "decay": 1, "zzzz": 0}, provided=1).problems) == 4


def test_wired_parameters_tell_what_forward_takes_and_must_have():
    def forward(student, targets=None, *, mask, **more):
        pass

    assert wired_parameters(forward) == {"student": True, "targets": False, "mask": True}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing"),
        (True, "true"),
        ("a", "the text 'a'"),
        (1, "the number 1"),
        ([1], "the list [1]"),
    ],
)
def test_values_are_shown_in_words(value, shown):
    assert show(value) == shown


def test_text_that_names_a_member_is_that_member_even_where_text_would_do():
    class Mode(enum.Enum):
        NEAREST = 0

    def factory(mode: str | Mode | int = 0) -> None: ...

    assert bind(factory, {"mode": "NEAREST"}).arguments == {"mode": Mode.NEAREST}
    assert bind(factory, {"mode": "other"}).arguments == {"mode": "other"}
    assert bind(factory, {"mode": 3}).arguments == {"mode": 3}
