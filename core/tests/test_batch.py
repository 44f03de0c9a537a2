from collections import namedtuple

import pytest
import torch

from distill import Batch, Sample, Views
from distill.data.batch import collate, map_tensors

Pair = namedtuple("Pair", "left right")


def test_collate_stacks_inputs_targets_and_positions():
    batch = collate([Sample(torch.tensor([1.0, 2.0]), 7, 3), Sample(torch.zeros(2), 8, 5)])
    assert batch.inputs.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert batch.targets.tolist() == [7, 8]
    assert batch.index.tolist() == [3, 5]
    assert batch.extras == {}
    assert batch.share == 1.0
    assert len(batch) == 2


def test_collate_stacks_extras_by_key():
    samples = [Sample(0.0, 0, n, {"views": torch.full((3,), float(n))}) for n in range(2)]
    assert collate(samples).extras["views"].tolist() == [[0.0] * 3, [1.0] * 3]


def test_samples_without_target_give_a_batch_without_targets():
    assert collate([Sample(torch.ones(1)), Sample(torch.ones(1))]).targets is None


def test_a_target_that_only_some_samples_have_is_refused():
    with pytest.raises(TypeError):
        collate([Sample(torch.ones(1)), Sample(torch.ones(1), 3)])


def test_batch_moves_every_tensor_to_the_device_and_keeps_the_rest():
    batch = Batch(
        {"image": torch.ones(1), "name": "x"},
        [torch.ones(1)],
        torch.tensor([0]),
        {"views": (torch.ones(1),)},
        share=0.5,
    )
    moved = batch.to("meta")
    assert moved.inputs["image"].is_meta
    assert moved.inputs["name"] == "x"
    assert moved.targets[0].is_meta
    assert moved.index.is_meta
    assert moved.extras["views"][0].is_meta
    assert moved.share == 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(2), 2),
        ([torch.tensor(2), "a"], [2, "a"]),
        ((torch.tensor(2), None), (2, None)),
        (Pair(torch.tensor(2), 5), Pair(2, 5)),
        ({"a": {"b": torch.tensor(2)}}, {"a": {"b": 2}}),
    ],
    ids=["tensor", "list", "tuple", "namedtuple", "mapping"],
)
def test_map_tensors_keeps_the_kind_of_every_container(value, expected):
    mapped = map_tensors(torch.Tensor.item, value)
    assert mapped == expected
    assert type(mapped) is type(expected)


def test_images_are_put_into_a_memory_format_and_nothing_else_is():
    image, flow = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 2, 4, 5)
    batch = Batch({"image": image, "flow": flow}, torch.rand(2, 3, 4, 5), torch.arange(2))
    placed = batch.to("cpu", memory_format=torch.channels_last)
    assert placed.inputs["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(placed.inputs["image"], image)
    assert placed.inputs["flow"].is_contiguous()
    assert placed.targets.is_contiguous()


def test_moving_a_batch_keeps_its_place_in_the_step():
    place = {"share": 0.5, "ends_step": False, "lead": 1, "skipped": ((3, "torn"),)}
    batch = Batch(torch.zeros(2), None, torch.arange(2), **place).to("cpu")
    assert {name: getattr(batch, name) for name in place} == place


def test_collate_puts_the_views_of_a_sample_side_by_side():
    views = [Views((torch.full((2,), float(n)), torch.full((2,), n + 0.5))) for n in range(3)]
    batch = collate([Sample(pair, n, n) for n, pair in enumerate(views)])
    assert batch.inputs[:, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert batch.targets.tolist() == batch.index.tolist() == [0, 1, 2]
