"""Tensors as rows of bytes: what is kept of them, and how far off it may be."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill.errors import DataError
from distill.model.stored import Form, form_of
from distill.model.wiring import Address
from distill.store.encoding import Layout, decode, encode, layout
from distill.store.rows import CHECK
from distill.store_settings import ENCODINGS, Store

SAMPLES, CLASSES = 16, 1000


def logits(scale=3.0, samples=SAMPLES, classes=CLASSES):
    return scale * torch.randn(samples, classes, generator=torch.Generator().manual_seed(0))


DEFAULT = Store()


def kept(tensors, store=DEFAULT, name="teacher"):
    samples = len(next(iter(tensors.values())))
    form = layout(tensors, name, samples, store)
    rows = encode(form, tensors, samples)
    assert rows.shape == (samples, form.width)
    assert rows.dtype == torch.uint8
    assert Layout.of_plain(form.plain()) == form
    return decode(form, rows)


def of_kd(student, teacher, temperature):
    soft = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(*soft, reduction="batchmean")


def test_float32_is_kept_to_the_bit():
    given = logits()
    assert torch.equal(kept({"teacher": given}, Store("float32"))["teacher"], given)


def test_float16_is_kept_as_torch_rounds_it():
    given = logits()
    assert torch.equal(kept({"teacher": given})["teacher"], given.half().float())


def test_int8_is_at_most_half_a_step_off():
    given = logits()
    step = (given.amax(1) - given.amin(1)) / 255
    off = (kept({"teacher": given}, Store("int8"))["teacher"] - given).abs().amax(1)
    assert (off <= 0.501 * step).all()


def test_int8_keeps_a_row_of_one_value():
    given = torch.full((3, 5), 2.5)
    assert torch.equal(kept({"teacher": given}, Store("int8"))["teacher"], given)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_thousand_logits_take_what_they_may(encoding):
    form = layout({"teacher": logits()}, "teacher", SAMPLES, Store(encoding))
    most = {"float16": 2000 * 1.02, "float32": 4000 * 1.02, "int8": 1008 * 1.02, "top_k": 64}
    assert form.width + CHECK.itemsize <= most[encoding]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_keeps_the_highest_logits_and_the_mass_of_the_rest(temperature):
    given = logits()
    found = kept({"teacher": given}, Store("top_k", 12, temperature))["teacher"]
    values, index = given.topk(12, 1)
    assert torch.equal(found.gather(1, index), values.half().float())
    one, other = (F.softmax(z / temperature, 1) for z in (given, found))
    mass = 1 - one.gather(1, index).sum(1), 1 - other.gather(1, index).sum(1)
    torch.testing.assert_close(*mass, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_changes_kds_gradient_by_at_most_twice_the_mass_of_the_rest(temperature):
    given, student = logits(), logits(1.0).flip(0)
    found = kept({"teacher": given}, Store("top_k", 12, temperature))["teacher"]
    gradients = []
    for teacher in (given, found):
        z = student.clone().requires_grad_()
        (of_kd(z, teacher, temperature) * SAMPLES / temperature).backward()
        gradients.append(z.grad)
    rest = 1 - F.softmax(given / temperature, 1).topk(12, 1)[0].sum(1)
    off = (gradients[0] - gradients[1]).abs().sum(1)
    assert (off <= 2 * rest + 0.01).all()
    assert (off >= 0.05 * rest).any()  # the bound is of the error's size


def test_top_k_of_a_sure_teacher_gives_kd_as_it_is():
    given = logits()
    given[torch.arange(SAMPLES), torch.arange(SAMPLES)] += 30
    found = kept({"teacher": given}, Store("top_k"))["teacher"]
    torch.testing.assert_close(
        of_kd(logits(1.0), found, 1.0), of_kd(logits(1.0), given, 1.0), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("classes", [40_000, 70_000])
def test_top_k_finds_classes_beyond_what_two_bytes_can_count(classes):
    given = torch.zeros(2, classes)
    given[0, classes - 1] = given[1, 33_000] = 9.0
    found = kept({"teacher": given}, Store("top_k", 3))["teacher"]
    assert found.argmax(1).tolist() == [classes - 1, 33_000]


def test_features_whole_numbers_and_several_views_come_back_in_their_shapes():
    tensors = {
        "teacher": logits(classes=7),
        "mask": torch.arange(SAMPLES).remainder(2).bool(),
        "teacher.layer": torch.randn(SAMPLES, 3, 2, 2),
        "views": torch.randn(4 * SAMPLES, 5),
        "labels": torch.arange(SAMPLES),
    }
    samples = SAMPLES
    form = layout(tensors, "teacher", samples, Store("float32"))
    found = decode(form, encode(form, tensors, samples))
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_single_sample_comes_back_wherever_its_values_lie_in_the_row():
    tensors = {"a": torch.tensor([True]), "b": torch.randn(1, 3), "c": torch.randn(1, 2)}
    found = kept(tensors, Store("float32"))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("encoding", "value", "lost"),
    [
        ("float16", 1e6, True),
        ("float16", -math.inf, False),
        ("top_k", 1e6, True),
        ("int8", -math.inf, True),
        ("int8", 1e6, False),
        ("float32", 1e6, False),
    ],
)
def test_what_an_encoding_does_not_hold_is_noticed(encoding, value, lost):
    values = {"teacher": torch.tensor([[1.0, 2.0, value], [1.0, 2.0, 3.0]])}
    store = Store(encoding, top=2)
    form = form_of(values, [Address("teacher", "teacher")], "teacher", 2, store)
    rows = form.encode(values, 2)
    assert form.lost(values, rows).item() is lost


@pytest.mark.parametrize(
    ("encoding", "row", "lost"),
    [
        ("float16", [1.0, -math.inf, 7e4, 0.0], True),
        ("float16", [1.0, -math.inf, math.nan, 0.0], False),
        ("top_k", [1.0, -math.inf, 7e4, 0.0], True),
        ("top_k", [-math.inf, -math.inf, -7e4, -8e4], True),
        ("top_k", [3.0, -8e4, -math.inf, 2.0], True),
        ("top_k", [3.0, 2.0, -math.inf, -math.inf], False),
        ("top_k", [3.0, 2.0, -8e4, 1.0], False),
        ("top_k", [math.inf, math.inf, math.inf, 1.0], False),
    ],
)
def test_a_finite_value_that_is_not_kept_is_noticed_beside_what_is_infinite_itself(
    encoding, row, lost
):
    values = {"teacher": torch.tensor([row, [0.0, 1.0, 2.0, -math.inf]])}
    store = Store(encoding, top=2)
    form = form_of(values, [Address("teacher", "teacher")], "teacher", 2, store)
    assert form.lost(values, form.encode(values, 2)).item() is lost


def test_what_is_infinite_itself_is_kept():
    values = {"teacher": torch.tensor([[1.0, -math.inf]])}
    form = form_of(values, [Address("teacher", "teacher")], "teacher", 1, Store())
    assert torch.equal(form.decode(form.encode(values, 1))["teacher"], values["teacher"])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor(1.0), "does not part by samples"),
        (torch.zeros(3, 2), "does not part by samples"),
    ],
)
def test_what_does_not_begin_with_the_batch_is_refused(tensor, message):
    with pytest.raises(DataError, match=message):
        layout({"teacher": tensor}, "teacher", 2, Store())


@pytest.mark.parametrize("shape", [(2, 5), (2, 20, 3, 3)])
def test_top_k_is_refused_for_what_are_no_logits_of_enough_classes(shape):
    with pytest.raises(DataError, match="more than top: 12 classes; write a smaller top"):
        layout({"teacher": torch.zeros(shape)}, "teacher", 2, Store("top_k"))


def test_another_shape_than_before_is_refused():
    form = layout({"teacher": torch.zeros(2, 5)}, "teacher", 2, Store())
    with pytest.raises(DataError, match="keeps values of one shape only"):
        encode(form, {"teacher": torch.zeros(2, 6)}, 2)


def test_what_is_read_of_a_value_in_parts_is_kept_in_parts():
    values = {
        "teacher": {"logits": torch.ones(2, 3), "other": torch.zeros(2, 9)},
        "teacher.stack": [torch.ones(2, 1), torch.zeros(2, 2)],
        "teacher.pair": (torch.ones(2, 4), None),
    }
    addresses = [
        Address("teacher.logits", "teacher", ("logits",)),
        Address("teacher.stack", "teacher.stack"),
        Address("teacher.pair", "teacher.pair", ("0",)),
    ]
    form = form_of(values, addresses, "teacher", 2, Store("float32"))
    assert Form.of_plain(form.plain()) == form
    found = form.decode(form.encode(values, 2))
    for address in addresses:
        one, other = address.read(found), address.read(values)
        pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert "other" not in found["teacher"]


def test_a_value_that_is_no_tensor_is_refused():
    with pytest.raises(DataError, match="'teacher' is a str"):
        form_of({"teacher": "a"}, [Address("teacher", "teacher")], "teacher", 1, Store())
