"""Batch transforms, the same on however many processes share a batch."""

import pytest
import torch

from distill import Batch, DataError
from distill.data.loader import training_batches
from distill.data.mixing import Mixing
from distill.data.plan import Plan
from distill.data.source import Source
from distill.testing import ToyData

CPU = torch.device("cpu")


def blend(inputs, targets):
    """Mixes each sample with the one before it, by a factor for the whole batch."""
    factor = torch.rand(())
    soft = torch.nn.functional.one_hot(targets, 3).float() if targets.dim() == 1 else targets
    return torch.lerp(inputs, inputs.roll(1, 0), factor), torch.lerp(soft, soft.roll(1, 0), factor)


def add(inputs, targets):
    return inputs + torch.rand(()), targets


def mixed(transforms, epoch=0, size=11, batch_size=6):
    """What one process makes of an epoch."""
    mixing = Mixing(transforms, seed=1)
    plan, source = Plan(size, batch_size), Source("toy", ToyData(size))
    batches = training_batches(source, plan, seed=1, epoch=epoch, lead=mixing.lead)
    return [mixing(batch, epoch, number, CPU) for number, batch in enumerate(batches)]


@pytest.mark.parametrize("transforms", [[blend], [add, blend], [blend, blend, add]])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_parts_of_processes_are_those_of_one_to_the_bit(every_rank, transforms, world):
    whole = mixed(transforms)
    parts = every_rank(world, lambda: mixed(transforms))
    for number, batch in enumerate(whole):
        own = [of_rank[number] for of_rank in parts if of_rank[number].share]
        for name in ("inputs", "targets", "index"):
            together = torch.cat([getattr(part, name) for part in own])
            assert torch.equal(together, getattr(batch, name)), name
        assert all(part.lead == 0 for part in own)


def test_what_is_drawn_depends_on_seed_epoch_batch_and_transform():
    batch = Batch(torch.zeros(1), None, torch.tensor([0]))
    drawn = set()
    for seed in (1, 2):
        for epoch in (0, 1):
            for number in (0, 1, 2):
                one = Mixing([add], seed)(batch, epoch, number, CPU).inputs.item()
                both = Mixing([add, add], seed)(batch, epoch, number, CPU).inputs.item()
                assert Mixing([add], seed)(batch, epoch, number, CPU).inputs.item() == one
                drawn |= {one, both}
    assert len(drawn) >= 2 * 2 * 3 + 1


def test_a_transform_that_fails_is_a_data_error_with_its_name():
    class Strict:
        def __call__(self, inputs, targets):
            raise ValueError("needs labels\nand more")

    batch = Batch(torch.zeros(1), None, torch.tensor([0]))
    with pytest.raises(DataError, match=r"transform Strict fails on its batch: needs labels$"):
        Mixing([Strict()], 1)(batch, 0, 0, CPU)


def test_extras_are_parted_like_inputs():
    extras = {"a": torch.arange(4)}
    batch = Batch(torch.arange(4.0), torch.arange(4), torch.arange(4), extras, lead=1)
    own = Mixing([add], 1)(batch, 0, 0, CPU)
    assert own.extras["a"].tolist() == own.targets.tolist() == own.index.tolist() == [1, 2, 3]


def test_lists_of_inputs_cannot_be_parted_and_are_refused_under_several_processes():
    def same(inputs, targets):
        return inputs, targets

    batch = Batch([torch.zeros(2), torch.zeros(3)], None, torch.arange(2))
    assert len(Mixing([same], 1)(batch, 0, 0, CPU).inputs) == 2
    with pytest.raises(DataError, match="need the inputs of a batch as one tensor"):
        Mixing([same], 1)(Batch(batch.inputs, None, batch.index, lead=1), 0, 0, CPU)


@pytest.mark.parametrize("size", [6, 7, 8, 9, 10])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("transforms", [[blend], [blend, blend]])
def test_so_they_are_in_a_last_batch_with_fewer_samples_than_processes(
    every_rank, transforms, world, size
):
    whole = mixed(transforms, size=size)
    parts = every_rank(world, lambda: mixed(transforms, size=size))
    assert {len(of_rank) for of_rank in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        own = [of_rank[number] for of_rank in parts if of_rank[number].share]
        assert torch.equal(torch.cat([part.inputs for part in own]), batch.inputs)
        assert torch.equal(torch.cat([part.targets for part in own]), batch.targets)


def test_it_is_the_mixing_of_the_whole_batch_by_hand():
    (batch,) = mixed([blend, blend], size=6)
    data = ToyData(6)
    expected = data.inputs[batch.index]
    first, second = (
        Mixing([add, add][: n + 1], 1)(
            Batch(torch.zeros(1), None, torch.tensor([0])), 0, 0, CPU
        ).inputs.item()
        for n in range(2)
    )
    factors = [first, second - first]
    for factor in factors:
        before = torch.stack([expected[i - 1] for i in range(6)])
        expected = expected * (1 - factor) + before * factor
    torch.testing.assert_close(batch.inputs, expected)
    assert all(0 < factor < 1 for factor in factors)
    assert factors[0] != pytest.approx(factors[1])


def test_neither_the_process_nor_what_was_drawn_before_matters(every_rank):
    batch = Batch(torch.zeros(3), torch.zeros(3), torch.arange(3))

    def drawn():
        torch.rand(torch.randint(9, ()).item())
        return Mixing([add, add], 1)(batch, 2, 3, CPU).inputs.tolist()

    torch.manual_seed(0)
    assert len({tuple(values) for world in (1, 2, 3) for values in every_rank(world, drawn)}) == 1


def test_inputs_may_be_a_mapping_of_tensors():
    def both(inputs, targets):
        return {key: (value + value.roll(1, 0)) / 2 for key, value in inputs.items()}, targets

    inputs = {"a": torch.arange(4.0), "b": torch.arange(8.0).view(4, 2)}
    batch = Batch(inputs, torch.arange(4), torch.arange(4), lead=1)
    own = Mixing([both], 1)(batch, 0, 0, CPU)
    assert own.inputs["a"].tolist() == [0.5, 1.5, 2.5]
    assert own.inputs["b"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert own.targets.tolist() == [1, 2, 3]


@pytest.mark.parametrize("world", [1, 2])
def test_lists_that_a_collate_gives_are_refused_on_every_one_of_several_processes(
    every_rank, world
):
    def listed(samples):
        index = torch.tensor([sample.index for sample in samples])
        return Batch([sample.input for sample in samples], None, index)

    def same(inputs, targets):
        return inputs, targets

    def read():
        mixing, source = Mixing([same], seed=1), Source("toy", ToyData(6), collate=listed)
        batches = training_batches(source, Plan(6, 6), seed=1, epoch=0, lead=mixing.lead)
        try:
            return len([mixing(batch, 0, 0, CPU) for batch in batches])
        except DataError as error:
            return str(error)

    said = every_rank(world, read)
    if world == 1:
        assert said == [1]
    else:
        assert all("one tensor (or a mapping of tensors), not as a list" in text for text in said)
