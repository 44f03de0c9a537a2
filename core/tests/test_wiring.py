import pytest
import torch
from torch import nn

from distill import DistillError
from distill.model.precision import to_float32
from distill.model.wiring import Address, Call, CallError, describe

VALUES = {
    "student": torch.ones(2, 3),
    "student.pair": (torch.zeros(1), [torch.ones(1), torch.full((1,), 2.0)]),
    "maps": {"low": torch.zeros(4), "high": torch.ones(4)},
}


class Difference(nn.Module):
    def forward(self, left, right):
        return (left - right).sum()


def call(**addresses):
    return Call(
        "difference",
        Difference(),
        {n: Address(a.replace("/", "."), *split(a)) for n, a in addresses.items()},
    )


def split(text):
    value, *keys = text.split("/")
    return value, tuple(keys)


def test_an_address_finds_a_value_by_name_and_by_keys_into_it():
    assert Address("student", "student").read(VALUES) is VALUES["student"]
    assert Address("maps.high", "maps", ("high",)).read(VALUES).tolist() == [1.0] * 4
    nested = Address("student.pair.1.1", "student.pair", ("1", "1"))
    assert nested.read(VALUES).item() == 2.0


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        ("maps", "hihg", "'maps' has no part 'hihg'; did you mean high?"),
        ("maps", "x", r"'maps' has no part 'x' \(it has: low, high\)"),
        (
            "student.pair",
            "2",
            r"'student.pair' has no part '2'; it is \[\(1,\), \[\(1,\), \(1,\)\]\]",
        ),
        ("student", "logits", r"'student' has no part 'logits'; it is \(2, 3\)"),
    ],
)
def test_a_missing_part_is_answered_with_what_there_is(value, key, message):
    with pytest.raises(DistillError, match=message):
        Address(f"{value}.{key}", value, (key,)).read(VALUES)


def test_a_call_passes_values_by_the_names_of_forward():
    result = call(left="maps/high", right="maps/low")(VALUES)
    assert result.item() == 4.0


def test_a_failing_module_is_told_with_every_reference_and_shape():
    failing = call(left="student", right="maps/high")
    with pytest.raises(CallError) as caught:
        failing(VALUES)
    assert str(caught.value).startswith(
        "Difference failed on left=student (2, 3), right=maps.high (4,): The size of tensor a"
    )
    assert caught.value.module is failing.module


def test_a_part_that_is_not_there_is_laid_at_the_module_that_wants_it():
    wanting = call(left="maps/hihg", right="student")
    with pytest.raises(CallError, match="did you mean high") as caught:
        wanting(VALUES)
    assert caught.value.module is wanting.module


def test_running_out_of_memory_stays_what_it_is():
    class Hungry(nn.Module):
        def forward(self, left):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        Call("hungry", Hungry(), {"left": Address("student", "student")})(VALUES)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "(2, 3)"),
        ({"a": torch.zeros(1), "b": [torch.zeros(())]}, "{a: (1,), b: [()]}"),
        (None, "NoneType"),
    ],
)
def test_values_are_described_by_their_shapes(value, text):
    assert describe(value) == text


def test_only_tensors_of_reduced_precision_become_float32():
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]
    given = {"a": [torch.ones(1, dtype=kind) for kind in kinds], "b": "text"}
    widened = to_float32(given)
    assert [t.dtype for t in widened["a"]] == [torch.float32] * 3 + kinds[3:]
    assert widened["b"] == "text"
    assert widened["a"][3] is given["a"][3]
