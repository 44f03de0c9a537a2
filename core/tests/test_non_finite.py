"""A gradient that is not finite: what it comes from."""

import math

import pytest
import torch
from torch import nn

from distill import NumericalError, distributed
from distill.data.source import Source
from distill.model.wiring import Address
from distill.testing import ToyMLP
from distill.training import non_finite
from distill.training.non_finite import NonFinite, Seen, explanation, losses_are_finite

CPU = torch.device("cpu")
LABELLED = {"input": Address("student", "student"), "target": Address("targets", "targets")}


def seen(samples=(0, 1), counts=True, **losses):
    values = {"ce": 1.0, "kd": 2.0, "total": 3.0, **losses}
    given = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    return Seen(given, torch.tensor(samples), counts)


def source_of(*bad, size=40):
    def read(index):
        return {"points": torch.tensor([math.nan if index in bad else 1.0])}, 0

    return Source("toy", [read(index) for index in range(size)])


def said(*batches, trained=None, source=None, step=7):
    error = explanation(NonFinite(step, batches), "kd", trained or {}, source or source_of())
    assert isinstance(error, NumericalError)
    begin, end = "stage 'kd', step 7: ", ". This step was not followed"
    text = str(error)
    assert text.startswith(begin)
    assert "a lower learning rate, clip.norm or precision: fp32 may help" in text
    return text[len(begin) : text.index(end)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_are_finite_if_every_total_is(bad):
    assert losses_are_finite([seen(), seen()])
    assert not losses_are_finite([seen(), seen(total=bad)])


def test_the_term_is_named_with_its_value_and_samples():
    bad = seen((3, 4), kd=math.nan, total=math.nan)
    assert said(seen(), bad) == "the term 'kd' is nan, for samples 3, 4"


def test_several_terms_are_named():
    bad = seen((3,), kd=math.nan, ce=math.inf, total=math.nan)
    assert said(bad) == "the term 'ce' is inf and 'kd' is nan, for sample 3"


def test_several_batches_of_a_step_are_named():
    one, other = seen((3,), kd=math.inf, total=math.inf), seen((5,), ce=math.inf, total=math.inf)
    assert said(one, seen(), other) == (
        "the term 'kd' is inf, for sample 3; the term 'ce' is inf, for sample 5"
    )


def test_many_samples_are_counted():
    bad = seen(tuple(range(20)), kd=math.inf, total=math.inf)
    shown = ", ".join(map(str, range(16)))
    assert said(bad) == f"the term 'kd' is inf, for samples {shown} and 4 more"


def test_samples_whose_input_is_not_finite_are_named_alone():
    bad = seen((3, 4, 5), kd=math.nan, total=math.nan)
    assert said(bad, source=source_of(4)) == (
        "the term 'kd' is nan; the input of sample 4 is not finite"
    )
    assert said(bad, source=source_of(3, 4)) == (
        "the term 'kd' is nan; the input of samples 3, 4 is not finite"
    )


def test_a_sample_that_does_not_count_is_no_cause():
    idle = seen((9,), counts=False, kd=math.nan, total=math.nan)
    assert said(idle, seen((3,), ce=math.nan, total=math.nan)) == (
        "the term 'ce' is nan, for sample 3"
    )


def test_without_a_bad_term_the_parameters_are_named():
    student, regressor = ToyMLP(), nn.Linear(2, 2)
    for parameter in (*student.parameters(), *regressor.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    student.head.bias.grad[1] = math.inf
    regressor.weight.grad[0, 0] = math.nan
    trained = {"student": student, "regressor": regressor}
    text = "every term is finite, the gradient of student.head.bias, regressor.weight is not"
    assert said(seen(), trained=trained) == text


def test_many_parameters_are_counted():
    student = ToyMLP()
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert said(seen(), trained={"student": student}) == (
        "every term is finite, the gradient of student.body.0.weight, student.body.0.bias, "
        "student.head.weight and 1 more is not"
    )


@pytest.mark.parametrize("in_data", [False, True])
def test_under_several_processes_the_rank_is_named_and_a_bad_input_is_the_cause(
    monkeypatch, in_data
):
    bad = source_of(4) if in_data else source_of()
    ranks = [(seen((3,), kd=math.nan, total=math.nan),), (seen((4,), kd=math.nan, total=math.nan),)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = [non_finite._findings(batches, bad) for batches in ranks]
    monkeypatch.setattr(distributed, "gather_objects", lambda own: found)
    expected = "the term 'kd' is nan on rank 1; the input of sample 4 is not finite"
    if not in_data:
        each = (f"the term 'kd' is nan on rank {rank}, for sample {rank + 3}" for rank in (0, 1))
        expected = "; ".join(each)
    assert said(*ranks[0], source=bad) == expected
