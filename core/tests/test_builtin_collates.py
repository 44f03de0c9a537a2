import pickle

import pytest
import torch

from distill import Sample, builtin
from distill.builtin.collates import ListCollate, PadCollate
from distill.data.batch import collate
from distill.signature import bind


def test_the_hook_offers_them_by_name():
    assert builtin.distill_collates() == {"ListCollate": ListCollate, "PadCollate": PadCollate}
    for params in ({}, {"value": 1}, {"value": {"ids": 1}}, {"target_value": -100}):
        assert bind(PadCollate, params).problems == []


@pytest.mark.parametrize("made", [ListCollate(), PadCollate(2.0, -100)])
def test_a_collate_function_reaches_loader_workers(made):
    samples = [Sample(torch.ones(2), 0, 4)]
    assert pickle.loads(pickle.dumps(made))(samples).index.tolist() == [4]


def test_list_collate_leaves_everything_apart():
    images = [torch.rand(3, 4, 5), torch.rand(3, 6, 2)]
    boxes = [{"boxes": torch.rand(1, 4)}, {"boxes": torch.rand(0, 4)}]
    samples = [Sample(images[n], boxes[n], 7 + n, {"size": (n, n)}) for n in (0, 1)]
    batch = ListCollate()(samples)
    assert batch.inputs == images
    assert batch.targets == boxes
    assert batch.extras == {"size": [(0, 0), (1, 1)]}
    assert batch.index.tolist() == [7, 8]
    assert batch.index.dtype == torch.int64
    assert len(batch) == 2


def test_list_collate_has_no_targets_where_no_sample_has_one():
    assert ListCollate()([Sample("a"), Sample("b")]).targets is None
    assert ListCollate()([Sample("a", 1), Sample("b")]).targets == [1, None]


def test_inputs_are_padded_along_every_dimension_to_the_largest():
    inputs = [torch.rand(2, 5), torch.rand(4, 3), torch.rand(1, 1)]
    batch = PadCollate(value=-1.0)([Sample(tensor, 0) for tensor in inputs])
    assert batch.inputs.shape == batch.extras["mask"].shape == (3, 4, 5)
    for padded, mask, own in zip(batch.inputs, batch.extras["mask"], inputs, strict=True):
        rows, columns = own.shape
        expected = [
            [own[r, c].item() if r < rows and c < columns else -1.0 for c in range(5)]
            for r in range(4)
        ]
        assert padded.tolist() == expected
        assert mask.tolist() == [[r < rows and c < columns for c in range(5)] for r in range(4)]
        assert torch.equal(padded[mask], own.flatten())


def test_inputs_of_one_size_are_as_in_the_usual_collate_with_a_full_mask():
    samples = [Sample(torch.rand(3, 2), n, n, {"logits": torch.rand(4)}) for n in range(5)]
    batch, usual = PadCollate()(samples), collate(samples)
    assert torch.equal(batch.inputs, usual.inputs)
    assert torch.equal(batch.targets, usual.targets)
    assert torch.equal(batch.index, usual.index)
    assert torch.equal(batch.extras["logits"], usual.extras["logits"])
    assert batch.extras["mask"].all()


def test_mappings_are_padded_by_key_each_with_its_value():
    samples = [
        Sample({"ids": torch.arange(n) + 5, "attention": torch.ones(n).long(), "number": n}, n)
        for n in (1, 3)
    ]
    batch = PadCollate(value={"ids": 1})(samples)
    assert batch.inputs["ids"].tolist() == [[5, 1, 1], [5, 6, 7]]
    assert batch.inputs["attention"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.inputs["number"].tolist() == [1, 3]
    assert batch.inputs["ids"].dtype == torch.int64
    assert set(batch.extras["mask"]) == {"ids", "attention"}
    assert batch.extras["mask"]["ids"].tolist() == [[True, False, False], [True] * 3]
    assert PadCollate(value=9)(samples).inputs["attention"].tolist() == [[1, 9, 9], [1, 1, 1]]


def test_targets_are_padded_where_a_value_is_given():
    samples = [Sample(torch.zeros(n), torch.arange(n)) for n in (1, 2)]
    batch = PadCollate(target_value=-100)(samples)
    assert batch.targets.tolist() == [[0, -100], [0, 1]]
    with pytest.raises(RuntimeError):
        PadCollate()(samples)
    assert PadCollate(target_value=-100)([Sample(torch.zeros(1), 3)]).targets.tolist() == [3]
    assert PadCollate(target_value=-100)([Sample(torch.zeros(1))]).targets is None


def test_without_tensors_there_is_no_mask():
    batch = PadCollate()([Sample(1.5, 0), Sample(2.5, 1)])
    assert batch.inputs.tolist() == [1.5, 2.5]
    assert batch.extras == {}


def test_tensors_without_dimensions_are_stacked():
    batch = PadCollate()([Sample(torch.tensor(2), 0), Sample(torch.tensor(3), 1)])
    assert batch.inputs.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("made", "inputs", "said"),
    [
        (PadCollate(), [torch.zeros(2), torch.zeros(2, 2)], "inputs: 1-dim.* and 2-dim"),
        (PadCollate(), [torch.zeros(2), torch.zeros(2).long()], "inputs: .*float32 and .*int64"),
        (PadCollate(0.5), [torch.zeros(2).long()], "cannot pad inputs of torch.int64 with 0.5"),
        (PadCollate({"a": 0.5}), [{"a": torch.zeros(2).long()}], "cannot pad 'a' of torch.int64"),
        (PadCollate({"a": 1}), [torch.zeros(2)], "values by key, and the inputs are no mappings"),
    ],
)
def test_what_cannot_be_padded_is_an_error_in_words(made, inputs, said):
    with pytest.raises(ValueError, match=said):
        made([Sample(item, 0) for item in inputs])


def test_a_mask_that_is_there_already_is_not_overwritten():
    with pytest.raises(ValueError, match="the samples have one already"):
        PadCollate()([Sample(torch.zeros(2), 0, extras={"mask": 1})])


def test_a_key_that_a_sample_lacks_is_named():
    with pytest.raises(KeyError, match="ids"):
        PadCollate()([Sample({"ids": torch.zeros(1)}), Sample({})])
    with pytest.raises(KeyError, match="size"):
        ListCollate()([Sample(1, extras={"size": 1}), Sample(1)])
