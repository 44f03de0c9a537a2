import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from distill import ConfigError, DataError, DistillError, NumericalError, Observer
from distill.testing import ToyData, ToyMLP, toy_experiment, toy_registry
from distill.training.build import Builder
from distill.training.checkpoint import load_state, load_weights
from distill.training.seed_run import SeedRun
from distill.training.trainer import train_stage

CPU = torch.device("cpu")
REGRESSOR = {
    "type": "Linear",
    "params": {"in_features": 8, "out_features": 12},
    "inputs": {"input": "student.body"},
}
HINT = {
    "teacher": {"model": "wide"},
    "auxiliary": {"regressor": REGRESSOR},
    "criterion": {
        "hint": {"type": "MSELoss", "inputs": {"input": "regressor", "target": "teacher.body"}}
    },
}
DATA_WITH_A_REST_OF_ONE = {"train": "train", "batch_size": 19}
STILL = {"type": "SGD", "params": {"lr": 0.0}}


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student):
        return (self.scale * student - 1).square().mean()


class Exploding(nn.Module):
    def forward(self, student):
        return student.square().mean() * float("inf")


class Counting(ToyMLP):
    """Counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs)


class Recorder(Observer):
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def __call__(self, name, event):
        self.events.append((name, event))

    def of(self, name):
        return [event for kind, event in self.events if kind == name]


REGISTRY = toy_registry(
    losses={"Scaled": Scaled, "Exploding": Exploding}, models={"Counting": Counting}
)


def seed_run(folder, *stages, seed=0, registry=None, **keys):
    experiment = toy_experiment(folder, *stages, **keys)
    builder = Builder(experiment, registry or REGISTRY)
    models = {name: builder.model(name, seed) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, seed, CPU, folder / "run", Recorder(), models, sources)


def weights_of(module):
    return copy.deepcopy(module.state_dict())


def moved(module, before):
    return {name for name, v in module.state_dict().items() if not torch.equal(v, before[name])}


def test_a_stage_trains_its_student_and_leaves_its_weights(tmp_path):
    run = seed_run(tmp_path, {})
    before = weights_of(run.models["mlp"])
    result = train_stage(run, 0)
    assert moved(run.models["mlp"], before) == set(before)
    assert (result.stage, result.student, result.epochs) == ("stage0", "mlp", 2)
    assert result.parameters == sum(p.numel() for p in ToyMLP().parameters())
    last = ToyMLP()
    load_weights(last, tmp_path / "run" / "stage0" / "last.safetensors")
    assert moved(last, run.models["mlp"].state_dict()) == set()
    assert run.results == [result]


def test_training_learns_what_there_is_to_learn(tmp_path):
    result = train_stage(seed_run(tmp_path, {"epochs": 20}), 0)
    assert result.validation["accuracy"] >= 0.9


def test_the_teacher_stays_as_it_was_and_is_measured_first(tmp_path):
    run = seed_run(tmp_path, HINT)
    teacher = run.models["wide"].train()
    before = weights_of(teacher)
    result = train_stage(run, 0)
    assert moved(teacher, before) == set()
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert teacher.training
    assert 0 <= result.teachers["teacher"]["accuracy"] <= 1
    ((event),) = run.tell.of("stage_start")
    assert event.teachers == result.teachers


def test_a_teacher_below_its_min_accuracy_is_an_error_before_anything_trains(tmp_path):
    run = seed_run(tmp_path, {"teacher": {"model": "wide", "min_accuracy": 1.0}})
    before = weights_of(run.models["mlp"])
    with pytest.raises(ConfigError, match=r"teacher 'wide' reaches an accuracy of only 0\.\d+ on"):
        train_stage(run, 0)
    assert moved(run.models["mlp"], before) == set()
    assert not run.checkpoint.exists()


def test_of_a_teacher_trained_before_that_is_not_good_enough_its_stage_is_named(tmp_path):
    teaching = {"student": {"model": "wide"}}
    taught = {"student": {"model": "mlp"}, "teacher": {"model": "wide", "min_accuracy": 1.0}}
    run = seed_run(tmp_path, {**teaching, "epochs": 1}, taught)
    train_stage(run, 0)
    with pytest.raises(ConfigError, match=r"on 'val', less than 1; stage stage0 trained it"):
        train_stage(run, 1)


def test_a_teacher_that_is_good_enough_teaches(tmp_path):
    stage = {"student": {"model": "wide"}, "epochs": 20}
    distil = {"student": {"model": "mlp"}, "teacher": {"model": "wide", "min_accuracy": 0.8}}
    run = seed_run(tmp_path, stage, {**distil, "epochs": 1})
    train_stage(run, 0)
    assert train_stage(run, 1).teachers["teacher"]["accuracy"] >= 0.8


def test_min_accuracy_needs_the_accuracy(tmp_path):
    teacher = {"model": "wide", "min_accuracy": 0.0}
    metrics = [{"type": "accuracy", "params": {"top_k": 2}}]
    with pytest.raises(ConfigError, match="needs 'accuracy' among the stage's metrics"):
        train_stage(seed_run(tmp_path, {"teacher": teacher, "metrics": metrics}), 0)


def test_a_teacher_that_changes_while_it_teaches_is_an_error(tmp_path):
    models = {"mlp": {"type": "ToyMLP"}, "wide": {"type": "Counting"}}
    kd = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
    run = seed_run(tmp_path, {"teacher": {"model": "wide"}, "criterion": {"kd": kd}}, models=models)
    with pytest.raises(DistillError, match="the frozen teacher 'teacher' has changed"):
        train_stage(run, 0)


def test_auxiliary_modules_and_losses_with_parameters_learn_too(tmp_path):
    run = seed_run(tmp_path, {**HINT, "criterion": {**HINT["criterion"], "s": {"type": "Scaled"}}})
    built = run.assemble(run.builder.experiment.stages[0])
    regressor, loss = built.auxiliary["regressor"], built.terms["s"]
    before = weights_of(regressor), weights_of(loss)
    train_stage(run, 0)
    assert moved(regressor, before[0]) == {"weight", "bias"}
    assert moved(loss, before[1]) == {"scale"}


def test_what_is_frozen_does_not_move_and_is_free_afterwards(tmp_path):
    decay = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}
    run = seed_run(tmp_path, {"freeze": ["student.body"], "optimizer": decay}, {"freeze": []})
    student = run.models["mlp"]
    before = weights_of(student)
    train_stage(run, 0)
    assert moved(student, before) == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in student.parameters())
    train_stage(run, 1)
    assert moved(student, before) == set(before)


def test_an_inherited_auxiliary_module_goes_on_with_what_it_learned(tmp_path):
    run = seed_run(tmp_path, HINT, {"optimizer": STILL})
    train_stage(run, 0)
    key = ("auxiliary_modules", "stage0", "regressor")
    learned = weights_of(run.parts.modules[key])
    train_stage(run, 1)
    assert moved(run.parts.modules[key], learned) == set()
    assert len([k for k in run.parts.modules if k[0] == key[0]]) == 1


def test_a_students_weights_go_on_into_the_stage_where_it_teaches(tmp_path):
    run = seed_run(
        tmp_path,
        {"student": {"model": "wide"}},
        {"student": {"model": "mlp"}, "teacher": {"model": "wide"}},
    )
    first = train_stage(run, 0)
    second = train_stage(run, 1)
    assert second.teachers["teacher"] == first.validation


@pytest.mark.parametrize("keep", ["last", "best"])
def test_kept_weights_are_those_that_go_on(tmp_path, keep):
    rising = {"type": "SGD", "params": {"lr": 3.0}}
    run = seed_run(tmp_path, {"epochs": 6, "keep": keep, "optimizer": rising}, seed=3)
    result = train_stage(run, 0)
    epochs = run.tell.of("epoch_end")
    accuracies = [event.metrics["accuracy"] for event in epochs]
    assert result.best["accuracy"] == max(accuracies)
    assert result.best_epoch == accuracies.index(max(accuracies)) + 1
    assert result.best_epoch < 6, "the seed must give a run whose last epoch is not its best"
    assert result.validation["accuracy"] == accuracies[-1]
    kept = ToyMLP()
    load_weights(kept, tmp_path / "run" / "stage0" / f"{keep}.safetensors")
    assert moved(kept, run.models["mlp"].state_dict()) == set()
    other = {"last": "best", "best": "last"}[keep]
    load_weights(kept, tmp_path / "run" / "stage0" / f"{other}.safetensors")
    assert moved(kept, run.models["mlp"].state_dict())


def test_each_epoch_is_told_with_its_losses_metrics_and_learning_rate(tmp_path):
    scheduler = {"type": "StepLR", "params": {"step_size": 1}}
    kd = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}, "weight": 2.0}
    stage = {
        "teacher": {"model": "wide"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, "kd": kd},
        "scheduler": scheduler,
    }
    run = seed_run(tmp_path, stage, log_every=1)
    train_stage(run, 0)
    first, second = run.tell.of("epoch_end")
    assert [first.lr, second.lr] == pytest.approx([0.1, 0.01])
    assert [first.position.epoch, second.position.epoch] == [1, 2]
    assert [first.position.step, second.position.step] == [3, 6]
    assert first.losses["total"] == pytest.approx(first.losses["ce"] + 2 * first.losses["kd"])
    assert set(first.metrics) == {"accuracy"}
    steps = run.tell.of("step_end")
    assert [event.position.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].seconds_left == 0


def test_a_plateau_lowers_the_learning_rate(tmp_path):
    scheduler = {"type": "ReduceLROnPlateau", "params": {"mode": "max", "patience": 0}}
    run = seed_run(
        tmp_path, {"optimizer": STILL | {"params": {"lr": 1e-9}}, "scheduler": scheduler}
    )
    train_stage(run, 0)
    state = load_state(run.checkpoint)
    assert state["stage"] == 1
    rates = [event.lr for event in run.tell.of("epoch_end")]
    assert rates == [1e-9, 1e-9]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_its_state_is_saved(tmp_path, precision):
    run = seed_run(tmp_path, {"precision": precision, "epochs": 10})
    states = []
    save = run.save
    run.save = lambda *place: (save(*place), states.append(load_state(run.checkpoint)))
    result = train_stage(run, 0)
    assert result.validation["accuracy"] >= 0.6
    assert all(p.dtype == torch.float32 for p in run.models["mlp"].parameters())
    scaler = states[0]["optimization"]["scaler"]
    assert (scaler is not None and scaler["scale"] > 0) is (precision == "fp16")


def test_a_gradient_that_is_not_finite_stops_before_its_step_and_keeps_what_was(tmp_path):
    run = seed_run(tmp_path, {}, {"criterion": {"bad": {"type": "Exploding"}}})
    train_stage(run, 0)
    before = weights_of(run.models["mlp"])
    with pytest.raises(NumericalError) as caught:
        train_stage(run, 1)
    said = str(caught.value)
    (first, *_) = run.plan(run.builder.experiment.stages[1]).draw(0, 0)
    assert said.startswith(
        "stage 'stage1', step 1: the term 'bad' is inf, for samples "
        f"{', '.join(map(str, first))}. This step was not followed"
    )
    assert load_state(run.checkpoint)["stage"] == 1
    assert moved(run.models["mlp"], before) == set()


def test_an_input_that_is_not_finite_is_named(tmp_path):
    class Torn(ToyData):
        def __init__(self, **params):
            super().__init__(**params)
            self.inputs[13, 2] = float("nan")

    registry = toy_registry(datasets={"Torn": Torn})
    datasets = {
        "train": {"type": "Torn", "params": {"size": 20}},
        "val": {"type": "ToyData", "params": {"size": 12}},
    }
    run = seed_run(tmp_path, {}, registry=registry, datasets=datasets)
    drawn = run.plan(run.builder.experiment.stages[0]).draw(0, 0)
    step = next(number for number, batch in enumerate(drawn, 1) if 13 in batch)
    said = rf"step {step}: the term 'ce' is nan; the input of sample 13 is not finite\."
    with pytest.raises(NumericalError, match=said):
        train_stage(run, 0)


def test_what_is_worth_knowing_is_noted(tmp_path):
    data = {"train": "train", "batch_size": 19}
    run = seed_run(tmp_path, {"freeze": ["student.body"], "data": data})
    train_stage(run, 0)
    ((event),) = run.tell.of("stage_start")
    assert event.notes == [
        "40 parameters are frozen",
        "the last batch of an epoch is a single sample; data.drop_last leaves it out",
    ]
    assert event.trainable == event.parameters - 40


@pytest.mark.parametrize(
    ("weight", "lowest"),
    [
        (-0.5, "-0.5"),
        ({"start": 0, "end": -2, "over": 3}, "-1.33333"),
        ({"start": -1, "end": 1, "after": 1}, "-1"),
        ({"start": 1, "end": -1, "over": 8, "unit": "steps"}, "-0.5"),
        ({"start": -1, "end": 1}, None),
        ({"start": 1, "end": -3, "over": 4, "stop": 1}, None),
    ],
)
def test_a_term_that_is_made_larger_is_noted(tmp_path, weight, lowest):
    term = {"type": "CrossEntropyLoss", "weight": weight}
    run = seed_run(tmp_path, {"epochs": 2, "criterion": {"ce": term}})
    train_stage(run, 0)
    ((event),) = run.tell.of("stage_start")
    said = f"'ce' is made larger where its weight is negative (down to {lowest})"
    assert event.notes == ([said] if lowest else [])


COSINE = "CosineAnnealingLR has its lowest rate after T_max: "


@pytest.mark.parametrize(
    ("schedulers", "notes"),
    [
        ([(3, "epochs", None)], []),
        ([(5, "epochs", None)], [f"{COSINE}5 epochs, and acts for 3"]),
        ([(1, "epochs", None)], [f"{COSINE}1 epochs, and rises again: it acts for 3"]),
        ([(9, "steps", None)], []),
        ([(15, "steps", None)], [f"{COSINE}15 steps, and acts for 9"]),
        ([(1, "epochs", 1), (2, "epochs", None)], []),
        ([(3, "steps", 4), (2, "epochs", None)], []),
        ([(3, "epochs", 2), (1, "epochs", None)], [f"{COSINE}3 epochs, and acts for 2"]),
        (
            [(20, "steps", 20), (9, "epochs", None)],
            ["CosineAnnealingLR goes on to the end, which comes before its until: 20"],
        ),
    ],
)
def test_a_cosine_of_another_length_than_its_part_of_the_stage_is_noted(
    tmp_path, schedulers, notes
):
    described = [
        {"type": "CosineAnnealingLR", "params": {"T_max": lowest}, "unit": unit, "until": until}
        for lowest, unit, until in schedulers
    ]
    for each in described:
        if each["until"] is None:
            del each["until"]
    data = {"train": "train", "batch_size": 8, "drop_last": False}
    run = seed_run(tmp_path, {"epochs": 3, "scheduler": described, "data": data})
    train_stage(run, 0)
    ((event),) = run.tell.of("stage_start")
    assert event.notes == notes


def test_without_validation_data_nothing_is_measured(tmp_path):
    run = seed_run(tmp_path, {"data": {"train": "train", "batch_size": 8}})
    result = train_stage(run, 0)
    assert (result.validation, result.best, result.best_epoch) == ({}, {}, 0)
    assert not (tmp_path / "run" / "stage0" / "best.safetensors").exists()


def test_test_data_measure_the_student_at_the_end(tmp_path):
    top = {"type": "accuracy", "params": {"top_k": 3}}
    run = seed_run(tmp_path, {}, test={"dataset": "val", "metrics": ["accuracy", top]})
    result = train_stage(run, 0)
    assert result.test == {
        "accuracy": result.validation["accuracy"],
        "accuracy(top_k=3)": 1.0,
    }


class Normalized(ToyMLP):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs):
        return super().forward(self.norm(inputs))


class Picky(nn.Module):
    """Fails in training only, as a label out of range would."""

    def forward(self, student):
        if self.training:
            raise IndexError("Target 12 is out of bounds.")
        return student.mean()


def test_batchnorm_on_a_single_sample_says_what_to_set(tmp_path):
    registry = toy_registry(models={"Normalized": Normalized})
    stage = {"student": {"model": "normalized"}, "data": DATA_WITH_A_REST_OF_ONE}
    run = seed_run(
        tmp_path, stage, registry=registry, models={"normalized": {"type": "Normalized"}}
    )
    with pytest.raises(DataError, match=r"set data\.drop_last"):
        train_stage(run, 0)


def test_a_loss_that_fails_in_training_is_told_at_its_line(tmp_path):
    registry = toy_registry(losses={"Picky": Picky})
    run = seed_run(tmp_path, {"criterion": {"picky": {"type": "Picky"}}}, registry=registry)
    with pytest.raises(ConfigError, match="Target 12 is out of bounds") as caught:
        train_stage(run, 0)
    (fault,) = caught.value.faults
    assert fault.path == "stages.stage0.criterion.picky"
    assert fault.location.line > 0


def test_batches_may_be_accumulated_to_a_step(tmp_path):
    data = {"train": "train", "validate": "val", "batch_size": 4}
    whole = seed_run(tmp_path / "whole", {"data": {**data, "batch_size": 8}})
    train_stage(whole, 0)
    parted = seed_run(tmp_path / "parted", {"data": {**data, "accumulate": 2}})
    train_stage(parted, 0)
    for name, value in parted.models["mlp"].state_dict().items():
        torch.testing.assert_close(value, whole.models["mlp"].state_dict()[name])
    (event,) = parted.tell.of("stage_start")
    assert event.steps == 3
    assert event.notes == ["a step is 2 batches, 8 samples"]
    assert [event.position.step for event in parted.tell.of("epoch_end")] == [3, 6]


def test_an_average_follows_each_step_and_is_measured_and_left(tmp_path):
    run = seed_run(tmp_path, {"ema": {"decay": 0.5}, "epochs": 1})
    steps = []
    student = run.models["mlp"]
    expected = weights_of(student)
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(weights_of(student)))
    try:
        result = train_stage(run, 0)
    finally:
        handle.remove()
    assert len(steps) == 3
    for weights in steps:
        expected = {name: 0.5 * expected[name] + 0.5 * weights[name] for name in expected}
    averaged = ToyMLP()
    load_weights(averaged, tmp_path / "run" / "stage0" / "ema.safetensors")
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert set(result.validation) == {"accuracy", "ema.accuracy"}
    assert moved(student, steps[-1]) == set()
    (event,) = run.tell.of("stage_end")
    assert [file.name for file in event.files] == [
        "last.safetensors",
        "best.safetensors",
        "ema.safetensors",
    ]


def test_the_average_may_go_on_in_place_of_the_last_weights(tmp_path):
    run = seed_run(tmp_path, {"ema": {"decay": 0.9}, "keep": "ema"})
    train_stage(run, 0)
    kept = ToyMLP()
    load_weights(kept, tmp_path / "run" / "stage0" / "ema.safetensors")
    assert moved(kept, run.models["mlp"].state_dict()) == set()
    load_weights(kept, tmp_path / "run" / "stage0" / "last.safetensors")
    assert moved(kept, run.models["mlp"].state_dict())


def test_a_student_may_be_measured_every_so_many_steps_and_at_the_end(tmp_path):
    run = seed_run(tmp_path, {"evaluate": {"every": 2, "unit": "steps"}, "epochs": 3})
    result = train_stage(run, 0)
    middle = run.tell.of("evaluation_end")
    assert [event.position.step for event in middle] == [2, 4, 6, 8]
    assert [event.position.epoch for event in middle] == [0, 1, 1, 2]
    ends = run.tell.of("epoch_end")
    assert [bool(event.metrics) for event in ends] == [False, False, True]
    assert result.validation == ends[-1].metrics


def test_a_student_may_be_measured_every_so_many_epochs_and_at_the_end(tmp_path):
    run = seed_run(tmp_path, {"evaluate": {"every": 2}, "epochs": 5})
    train_stage(run, 0)
    assert run.tell.of("evaluation_end") == []
    measured = [bool(event.metrics) for event in run.tell.of("epoch_end")]
    assert measured == [False, True, False, True, True]


def test_further_validation_sets_are_measured_under_their_names(tmp_path):
    data = {"train": "train", "validate": ["val", "train"], "batch_size": 8}
    run = seed_run(tmp_path, {"data": data, "best_by": "train.accuracy", "epochs": 4})
    result = train_stage(run, 0)
    assert set(result.validation) == {"accuracy", "train.accuracy"}
    reached = [event.metrics["train.accuracy"] for event in run.tell.of("epoch_end")]
    assert result.best["train.accuracy"] == max(reached)
    assert result.best_epoch == reached.index(max(reached)) + 1


def test_a_scheduler_of_steps_steps_after_each(tmp_path):
    scheduler = {"type": "ExponentialLR", "params": {"gamma": 0.5}, "unit": "steps"}
    run = seed_run(tmp_path, {"scheduler": scheduler}, log_every=1)
    train_stage(run, 0)
    rates = [event.lr for event in run.tell.of("step_end")]
    assert len(rates) == 6
    assert all(after == before / 2 for before, after in itertools.pairwise(rates))
    assert [event.lr for event in run.tell.of("epoch_end")] == pytest.approx([0.1, 0.0125])


def test_the_weight_of_a_term_may_change_over_epochs_or_steps(tmp_path):
    kd = {"type": "MSELoss", "inputs": {"input": "student", "target": "teacher"}}
    by_epoch = {**kd, "weight": {"over": 2}}
    by_step = {**kd, "weight": {"start": 1.0, "end": 0.0, "over": 4, "unit": "steps"}}
    stage = {
        "teacher": {"model": "wide"},
        "criterion": {"ce": {"type": "CrossEntropyLoss"}, "a": by_epoch, "b": by_step},
    }
    run = seed_run(tmp_path, stage, log_every=1)
    train_stage(run, 0)
    first, second = run.tell.of("epoch_end")
    assert second.losses["total"] == pytest.approx(second.losses["ce"] + second.losses["a"])
    events = run.tell.of("step_end")
    ramp = [0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    for event, weight in zip(events, ramp, strict=True):
        losses = event.losses
        half = 0.5 if event.position.step <= 3 else 1.0
        total = losses["ce"] + half * losses["a"] + weight * losses["b"]
        assert losses["total"] == pytest.approx(total)
        assert set(event.weights) == {"ce", "a", "b"}
        assert event.weights["a"] == half
    assert first.position.step == 3


def test_skipped_samples_are_told_with_the_epoch(tmp_path):
    class Torn(ToyData):
        def __getitem__(self, index):
            if index == 13:
                raise OSError("torn")
            return super().__getitem__(index)

    registry = toy_registry(datasets={"Torn": Torn})
    datasets = {
        "train": {"type": "Torn", "params": {"size": 20}},
        "val": {"type": "ToyData", "params": {"size": 12}},
    }
    data = {"train": "train", "validate": "val", "batch_size": 8, "on_bad_sample": "skip"}
    run = seed_run(tmp_path, {"data": data}, registry=registry, datasets=datasets)
    train_stage(run, 0)
    for event in run.tell.of("epoch_end"):
        assert list(event.skipped) == [13]
        assert "sample 13 cannot be read: OSError: torn" in event.skipped[13]


def test_a_metric_that_a_scheduler_watches_and_that_is_not_measured_is_a_fault(tmp_path):
    """The parts of a metric of several values are known only once it is measured."""

    class Parts:
        def __init__(self):
            self.reset()

        def reset(self):
            pass

        def update(self, output, batch):
            pass

        def state(self):
            return None

        def merge(self, state):
            pass

        def compute(self):
            return {"a": 1.0, "b": 2.0}

    registry = toy_registry(metrics={"parts": Parts})
    plateau = {"type": "ReduceLROnPlateau", "params": {"mode": "max"}, "watch": "parts/c"}
    stage = {"metrics": ["parts"], "best_by": "parts/a", "scheduler": plateau}
    run = seed_run(tmp_path, stage, registry=registry)
    with pytest.raises(ConfigError, match="parts/c"):
        train_stage(run, 0)
