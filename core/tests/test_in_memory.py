"""Samples kept in memory, and transforms that whole batches go through."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from distill import ConfigError, DataError, Sample, Views, memory
from distill.data.batch import collate
from distill.data.batched import Pending
from distill.data.keepable import NotKeepable, split
from distill.data.keeping import keep
from distill.data.kept import OneByOne, Whole
from distill.data.loader import Loading, evaluation_batches, sample_batch, training_batches
from distill.data.plan import Plan
from distill.data.source import Source
from distill.registry import SINGULAR, Entry, Registry
from distill.testing import ToyData, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.checkpoint import load_state
from distill.training.in_memory import memory_notes
from distill.training.seed_run import SeedRun
from distill.training.trainer import train_stage

CPU = torch.device("cpu")


class Picture:
    """What is no tensor: an image of a library."""

    def __init__(self, values):
        self.values = values


class Pictures:
    """Sample ``n`` holds the bytes n, n + 1, n + 2 and has the label n."""

    def __init__(self, size=10, *, fail_at=(), wide_at=(), draw_at=(), make=lambda values: values):
        self.size, self.fail_at, self.wide_at = size, fail_at, wide_at
        self.draw_at, self.make = draw_at, make

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.fail_at:
            raise OSError("the file is damaged")
        if index in self.draw_at:
            random.random()
        width = 4 if index in self.wide_at else 3
        values = torch.arange(index, index + width, dtype=torch.uint8)
        return Sample(self.make(values), index, extras={"name": f"n{index}", "twice": 2 * index})


def to_tensor(picture):
    return picture.values if isinstance(picture, Picture) else picture


def add_one(values):
    return values + 1


def to_float(values):
    return values.float() / 2


def shift(values):
    return values + torch.randint(0, 100, ()).to(values.dtype)


def shift_any(picture):
    return Picture(shift(picture.values)) if isinstance(picture, Picture) else shift(picture)


def noise(values):
    return values + random.random() + torch.rand(())


@dataclass
class Form:
    """The form of a transform for whole batches."""

    function: object
    draws: int = 0
    pointwise: bool = True

    def takes(self, value):
        return isinstance(value, torch.Tensor)

    def __call__(self, inputs, draws):
        return self.function(inputs, draws) if self.draws else self.function(inputs)


SHIFT = Form(lambda x, draws: x + (draws[:, :1] * 100).to(x.dtype), 1, pointwise=False)
TENSOR, FLOAT = Form(to_tensor), Form(to_float)


def source_of(*transforms, forms=None, data=None, **more):
    batched = list(forms or [None] * len(transforms))
    return Source("photos", data or Pictures(), list(transforms), batched=batched, **more)


def kept(source, loading=None):
    return keep(source, split(source), loading or Loading(), CPU)


def whole(batches):
    return [batch.to(CPU) for batch in batches]


def epoch_of(source, *, plan=None, **options):
    plan = plan or Plan(len(source), 4)
    options = {"seed": 1, "epoch": 0, "loading": Loading(), **options}
    return whole(training_batches(source, plan, **options))


def by_index(batches):
    rows = [
        (i, row)
        for batch in batches
        for i, row in zip(batch.index.tolist(), batch.inputs, strict=True)
    ]
    return {index: row.tolist() for index, row in rows}


AUGMENTED = source_of(shift, to_float, forms=[SHIFT, FLOAT])


def test_what_draws_nothing_and_gives_no_floats_is_applied_once():
    source = source_of(add_one, shift, add_one, to_float, forms=[None, SHIFT, None, FLOAT])
    chosen = split(source)
    assert chosen.before == [0]
    whole_one, one, whole_two = chosen.steps
    assert (type(whole_one), whole_one.names) == (Whole, ["shift"])
    assert (type(one), one.names) == (OneByOne, ["add_one"])
    assert (type(whole_two), whole_two.names) == (Whole, ["to_float"])
    assert split(source_of(add_one, to_float, add_one)).before == [0]
    floats = Pictures(make=lambda values: values.float())
    assert split(source_of(to_float, add_one, noise, data=floats)).before == [0, 1]


def test_what_makes_tensors_comes_first_if_all_before_it_take_tensors():
    pictures = Pictures(make=Picture)
    source = source_of(shift_any, to_tensor, to_float, forms=[SHIFT, TENSOR, FLOAT], data=pictures)
    chosen = split(source)
    assert chosen.before == [1]
    assert [step.names for step in chosen.steps] == [["shift_any", "to_float"]]
    assert kept(source).inputs[3].tolist() == [3, 4, 5]
    source = source_of(shift_any, to_tensor, forms=[None, TENSOR], data=pictures)
    with pytest.raises(
        NotKeepable, match=r"are no tensors before its transform shift_any .*ToImage"
    ):
        split(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (source_of(data=Pictures(draw_at=range(10))), "'photos' itself draws random numbers"),
        (
            source_of(joint_transforms=[lambda v, t: (shift(v), t)]),
            "a joint transform of data set 'photos' draws random numbers",
        ),
        (source_of(collate=lambda samples: collate(samples)), "has a collate function"),
    ],
)
def test_what_cannot_be_kept_is_refused(source, message):
    with pytest.raises(NotKeepable, match=message):
        split(source)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_kept_with_its_target_and_extras(workers):
    joint = [lambda value, target: (value + 1, target * 10)]
    data = kept(replace(AUGMENTED, joint_transforms=joint), Loading(workers))
    assert data.inputs.dtype == torch.uint8
    assert data.inputs.tolist() == [[n + 1, n + 2, n + 3] for n in range(10)]
    (batch,) = whole(evaluation_batches(data, 10, seed=1))
    assert batch.targets.tolist() == list(range(0, 100, 10))
    assert batch.extras["name"] == [f"n{n}" for n in range(10)]
    assert batch.extras["twice"].tolist() == list(range(0, 20, 2))
    (chosen,) = epoch_of(data, plan=Plan(10, 3, sampler=[7, 2, 7]))
    assert (chosen.index.tolist(), chosen.targets.tolist()) == ([7, 2, 7], [70, 20, 70])
    assert chosen.extras["name"] == ["n7", "n2", "n7"]


def test_what_draws_nothing_gives_the_bits_of_samples_that_are_read():
    source = source_of(add_one, to_float, forms=[None, FLOAT])
    read, in_memory = epoch_of(source), epoch_of(kept(source))
    for one, other in zip(read, in_memory, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert one.index.tolist() == other.index.tolist()
        assert (one.share, one.ends_step, one.sizes) == (other.share, other.ends_step, other.sizes)


def test_draws_are_a_function_of_seed_epoch_and_sample(every_rank):
    for steps in ((SHIFT, FLOAT), (None, FLOAT)):  # whole batches, and one by one
        data = kept(source_of(shift, to_float, forms=steps))
        first = by_index(epoch_of(data))
        assert by_index(epoch_of(data, plan=Plan(10, 3))) == first
        assert by_index(epoch_of(data)) == first
        others = [epoch_of(data, epoch=1), epoch_of(data, seed=2)]
        for other in map(by_index, others):
            assert sum(other[index] == first[index] for index in first) <= 2
        parts = every_rank(2, lambda data=data: epoch_of(data))
        assert by_index([batch for part in parts for batch in part]) == first
        shifts = {row[0] * 2 - index for index, row in first.items()}
        assert len(shifts) > 5


def test_an_index_that_comes_again_is_augmented_anew():
    for form in (SHIFT, None):
        data = kept(source_of(shift, forms=[form]))
        (batch,) = epoch_of(data, plan=Plan(10, 8, sampler=[5] * 8))
        assert len(batch.inputs[:, 0].unique()) > 4


def test_runs_of_transforms_one_by_one_draw_apart():
    data = kept(source_of(noise, to_float, noise, forms=[None, FLOAT, None]))
    batch = epoch_of(data, plan=Plan(10, 10))[0]
    first = by_index([batch])
    alone = by_index(epoch_of(kept(source_of(noise, to_float, forms=[None, FLOAT]))))
    second = [first[i][0] - alone[i][0] for i in first]
    drawn = [2 * alone[i][0] - i for i in first]
    assert all(abs(a - b) > 1e-3 for a, b in zip(second, drawn, strict=True))


def test_every_transform_of_whole_batches_has_draws_of_its_own():
    for between in ([], [add_one]):
        transforms = [shift, *between, shift]
        forms = [SHIFT, *[None for _ in between], SHIFT]
        both = by_index(epoch_of(kept(source_of(*transforms, forms=forms))))
        moved = [row[0] - index - len(between) for index, row in both.items()]
        assert sum(total % 2 for total in moved) > 1  # none of them, of one draw taken twice


def test_fixed_views_are_the_same_in_every_run_and_tell_what_they_are_made_of():
    plan = Plan(10, 4, views=2)
    for form in (SHIFT, None):
        data = kept(source_of(shift, to_float, forms=[form, FLOAT]))
        epochs = [
            epoch_of(data, plan=plan, seed=seed, epoch=epoch, fingerprints="all")
            for seed, epoch in ((1, 0), (2, 2), (1, 1))
        ]
        first, later, other = map(by_index, epochs)
        assert first == later != other
        assert epochs[0][0].view.tolist() == [0, 0, 0, 0]
        prints = [{}, {}, {}]
        for number, epoch in enumerate(epochs):
            for batch in epoch:
                prints[number].update(
                    zip(batch.index.tolist(), batch.fingerprint.tolist(), strict=True)
                )
        assert prints[0] == prints[1]
        # Two views that are drawn alike are the same.
        assert len({*prints[0].values(), *prints[2].values()}) >= 18


def test_what_draws_nothing_has_one_fingerprint_and_another_sample_another():
    def prints(source, **options):
        batches = epoch_of(kept(source), fingerprints="all", **options)
        pairs = [(b.index.tolist(), b.fingerprint.tolist()) for b in batches]
        return {
            i: taken for indices, prints in pairs for i, taken in zip(indices, prints, strict=True)
        }

    for form in (FLOAT, None):
        source = source_of(to_float, forms=[form])
        first = prints(source)
        assert prints(source, seed=2, epoch=3, plan=Plan(10, 3)) == first
        assert len(set(first.values())) == 10
        wider = prints(
            replace(source, dataset=Pictures(make=lambda values: values + (values == 7)))
        )
        assert {index for index in first if wider[index] != first[index]} == {5, 6, 7}


def test_views_of_a_sample_lie_side_by_side_and_are_augmented_by_themselves():
    data = Pictures(make=lambda values: Views([values, values, values]))
    held = kept(source_of(shift, to_float, forms=[SHIFT, FLOAT], data=data))
    assert (held.inputs.shape, held.views) == ((30, 3), 3)
    (batch,) = whole(evaluation_batches(held, 4, seed=1))[:1]
    assert (batch.inputs.shape, batch.targets.tolist()) == ((12, 3), [0, 1, 2, 3])
    shifts = (batch.inputs[:, 0] * 2 - torch.arange(4).repeat_interleave(3)).view(4, 3)
    assert all(len(row.unique()) > 1 for row in shifts)
    apart = Pictures(make=lambda values: Views([values, values + 100]))
    (batch,) = epoch_of(kept(source_of(data=apart)), plan=Plan(10, 3, sampler=[7, 2, 7]))
    assert batch.inputs[:, 0].tolist() == [7, 107, 2, 102, 7, 107]
    one_by_one = kept(source_of(shift, forms=[None], data=data))
    (batch,) = whole(evaluation_batches(one_by_one, 4, seed=1))[:1]
    assert batch.inputs.shape == (12, 3)


def test_samples_of_other_shapes_are_refused_with_what_to_do():
    for place in (2, 90):  # among the first that are read together, and later
        source = source_of(shift, data=Pictures(100, wide_at=[place]), forms=[SHIFT])
        with pytest.raises(DataError, match=r"they differ before augmentation \(.*begin .* Resize"):
            kept(source)


def test_a_sample_that_draws_though_others_do_not_is_an_error():
    source = source_of(add_one, data=Pictures(100, draw_at=[33]))
    for loading in (Loading(), Loading(on_bad_sample="skip")):
        with pytest.raises(DataError, match=r"sample 33 cannot be read: .* draws random numbers"):
            keep(source, split(source), loading, CPU)


def test_unreadable_samples_are_told_or_stood_in_for_as_where_samples_are_read():
    source = source_of(add_one, data=Pictures(fail_at=[2, 3]))
    with pytest.raises(DataError, match="sample 2 cannot be read: OSError: the file is damaged"):
        kept(source)
    skipping = Loading(on_bad_sample="skip")
    data = kept(source, skipping)
    for batches in (
        lambda source: epoch_of(source, loading=skipping),
        lambda source: whole(evaluation_batches(source, 4, skipping, seed=1)),
    ):
        for one, other in zip(batches(source), batches(data), strict=True):
            assert one.index.tolist() == other.index.tolist()
            assert one.skipped == other.skipped
            assert torch.equal(one.inputs, other.inputs)


def test_a_sample_that_stands_in_looks_otherwise_than_in_its_own_place():
    source = source_of(shift, forms=[SHIFT], data=Pictures(fail_at=[2, 5]))
    skipping = Loading(on_bad_sample="skip")
    batches = epoch_of(kept(source, skipping), loading=skipping)
    rows = [
        (i, row[0])
        for b in batches
        for i, row in zip(b.index.tolist(), b.inputs.tolist(), strict=True)
    ]
    assert sorted(index for index, _ in rows) == [0, 1, 3, 3, 4, 6, 6, 7, 8, 9]
    assert len(set(rows)) == 10


def test_memory_is_told_before_it_is_taken_and_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(memory, "_told", set())
    kept(AUGMENTED)
    told = capsys.readouterr().err
    assert "the 10 samples of data set 'photos' in memory take 0.2 kB on cpu" in told
    monkeypatch.setattr(memory, "free_memory", lambda device: 90)
    with pytest.raises(NotKeepable, match=r"0\.1 kB are missing; set data\.in_memory: false"):
        kept(AUGMENTED)


def test_a_batch_goes_through_the_last_pointwise_transforms_to_the_same_bits():
    source = source_of(add_one, to_float, forms=[None, FLOAT])
    batches = list(training_batches(source, Plan(10, 4), seed=1, epoch=0))
    assert batches[0].inputs.dtype == torch.uint8
    plain = epoch_of(replace(source, batched=()))
    for batch, expected in zip(batches, plain, strict=True):
        assert torch.equal(batch.to(CPU).inputs, expected.inputs)
        assert batch.to(CPU).pending is None
    first = sample_batch(source, 2, 1)
    assert (first.inputs.dtype, first.to(CPU).inputs.dtype) == (torch.uint8, torch.float32)


def test_samples_go_through_them_by_themselves_where_a_batch_cannot():
    sums = lambda values: values.float().sum()  # noqa: E731
    pointwise = Form(lambda x: x.float().sum(-1))
    data = Pictures(wide_at=[2])
    source = source_of(sums, forms=[pointwise], data=data)
    (batch,) = epoch_of(source, plan=Plan(10, 10, sampler=range(10)))
    assert batch.inputs.tolist() == [sum(data[n].input.tolist()) for n in range(10)]
    source = source_of(sums, forms=[pointwise], collate=lambda samples: collate(samples))
    assert source.late == ()


def test_large_batches_go_through_part_by_part_to_the_same_bits():
    inputs, draws = torch.randint(0, 90, (7, 100_000), dtype=torch.uint8), torch.rand(7, 1)
    seen = []
    watching = Form(lambda x: seen.append(len(x)) or x.float())
    pending = Pending("photos", [SHIFT, watching, FLOAT], draws)
    assert torch.equal(pending(inputs), to_float(SHIFT(inputs, draws).float()))
    assert seen == [2, 2, 2, 1]


def test_only_the_last_transforms_are_left_to_the_batch():
    forms = [FLOAT, SHIFT, FLOAT, TENSOR]
    assert source_of(to_float, shift, to_float, to_tensor, forms=forms).late == [FLOAT, TENSOR]
    assert source_of(to_float, add_one, forms=[FLOAT, None]).late == []


def test_a_failure_on_a_batch_names_data_set_and_transform():
    def refuse(values):
        raise TypeError("should be a float tensor")

    source = source_of(add_one, forms=[Form(refuse)])
    with pytest.raises(DataError, match="'photos': Form fails on a batch: should be a float"):
        epoch_of(source)


class Shift:
    """A transform of a plugin."""

    def __init__(self, most: float = 1.0):
        self.most = most

    def __call__(self, values):
        return values + self.most * torch.rand(())


class Alone(Shift):
    """One without a form for batches."""


class BatchedShift(Form):
    def __init__(self, most: float = 1.0):
        super().__init__(lambda x, draws: x + most * draws[:, :1], 1, pointwise=False)


REGISTRY = toy_registry(
    transforms={"Shift": Shift, "Alone": Alone},
    batched_transforms={"Shift": BatchedShift},
    datasets={"Data": ToyData, "Odd": lambda size: Pictures(size, draw_at=range(size))},
)


def run_of(folder, *, transforms=("Shift", "Alone"), dataset="ToyData", epochs=2, **data):
    train = {"type": dataset, "params": {"size": 20}, "transforms": list(transforms)}
    val = {"type": "ToyData", "params": {"size": 12, "seed": 1}}
    stage = {
        "epochs": epochs,
        "data": {"train": "train", "validate": "val", "batch_size": 8, **data},
    }
    experiment = toy_experiment(folder, stage, datasets={"train": train, "val": val})
    builder = Builder(experiment, REGISTRY)
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, 0, CPU, folder / "run", lambda *event: None, models, sources)


def test_a_stage_trains_on_what_is_in_memory_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distill.memory._told", set())
    run = run_of(tmp_path, in_memory=True)
    train_stage(run, 0)
    assert list(run.kept) == ["train", "val"]
    notes = list(memory_notes(run))
    assert "the 20 samples of data set 'train' are kept in memory on cpu" in notes
    assert notes[0].about == "memory"
    told = capsys.readouterr().err
    assert "B on cpu, where" in told
    assert not any("B on cpu" in note for note in notes), "told before it was taken"
    assert "of data set 'train', Shift is applied to whole batches" in notes
    assert "of data set 'train', Alone is applied sample by sample" in notes
    other = run_of(tmp_path)
    train_stage(other, 0)
    assert (other.kept, list(memory_notes(other))) == ({}, [])


def test_a_resumed_stage_goes_on_to_the_same_bits(tmp_path):
    whole_run = run_of(tmp_path / "whole", in_memory=True)
    train_stage(whole_run, 0)
    half = run_of(tmp_path / "half", in_memory=True)
    saved = []
    monkeyed = half.save

    def save(stage, epoch, more):
        monkeyed(stage, epoch, more)
        saved.append(load_state(half.checkpoint))
        if epoch == 1:
            raise KeyboardInterrupt

    half.save = save
    with pytest.raises(KeyboardInterrupt):
        train_stage(half, 0)
    resumed = run_of(tmp_path / "half", in_memory=True)
    state = saved[0]
    resumed.models["mlp"].load_state_dict(state["models"]["mlp"])
    train_stage(resumed, 0, state)
    expected = whole_run.models["mlp"].state_dict()
    for name, value in resumed.models["mlp"].state_dict().items():
        assert torch.equal(value, expected[name])


def test_the_file_is_told_of_what_cannot_be_kept(tmp_path):
    run = run_of(tmp_path, dataset="Odd", transforms=(), in_memory=True)
    with pytest.raises(ConfigError, match=r"data\.in_memory: data set 'train' itself draws"):
        train_stage(run, 0)
    assert run.kept == {}


def test_a_batched_form_is_that_of_the_transform_s_own_plugin(tmp_path):
    source = run_of(tmp_path).sources["train"]
    assert [type(form) for form in source.batched] == [BatchedShift, type(None)]
    experiment = toy_experiment(
        tmp_path,
        {},
        datasets={
            "train": {"type": "ToyData", "transforms": ["Alone"]},
            "val": {"type": "ToyData"},
        },
    )
    offers = [entry for kind in SINGULAR for entry in REGISTRY.entries(kind)]
    foreign = Entry("batched_transforms", "Alone", BatchedShift, "another plugin")
    source = Builder(experiment, Registry([*offers, foreign])).source("train")
    assert source.batched == [None]


def test_a_transform_that_fails_is_told_with_its_data_set():
    def refuse(values):
        raise ValueError("too dark")

    for source in (source_of(refuse), source_of(shift, refuse)):
        with pytest.raises(DataError, match="'photos': refuse fails on a sample: ValueError: too"):
            split(source)
