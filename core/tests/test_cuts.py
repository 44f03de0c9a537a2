"""Models that a stage runs only as far as it needs; two processes run this file too."""

import copy
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import Batch, Observer, distributed, load, run
from distill.testing import run_processes, toy_experiment, toy_registry
from distill.training import parallel
from distill.training.build import Builder
from distill.training.prepared import prepare
from distill.training.seed_run import SeedRun
from distill.training.stage_notes import stage_notes
from distill.training.trainer import train_stage

CPU = torch.device("cpu")
DECAY = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}
CE = {"ce": {"type": "CrossEntropyLoss"}}
UNMEASURED = {"train": "train", "validate": None, "batch_size": 8}


class Counted(nn.Linear):
    """A layer that counts its calls."""

    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs)


class Chain(nn.Module):
    """Layers one behind the other."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = Counted(4, width), Counted(width, width)
        self.norm, self.head = nn.BatchNorm1d(width), Counted(width, 3)

    def forward(self, inputs):
        return self.head(self.norm(self.second(self.first(inputs).tanh()).tanh()))


class Choosing(Chain):
    """Goes ways that depend on its data: no trace of one forward tells of the next."""

    def forward(self, inputs):
        features = self.first(inputs)
        if features.sum() > 0:
            features = features * 2
        return self.head(self.norm(self.second(features.tanh())))


class Repeating(Chain):
    """Calls one layer several times."""

    def __init__(self):
        super().__init__()
        self.act, self.times = nn.Tanh(), 3

    def forward(self, inputs):
        features = self.first(inputs)
        for _ in range(self.times):
            features = self.act(2 * features)
        return self.head(self.norm(self.second(features)))


class Dropping(Chain):
    """Leaves out its second layer in most steps of training."""

    def forward(self, inputs):
        features = self.first(inputs).tanh()
        if not self.training or torch.rand(()) > 0.8:
            features = features + self.second(features)
        return self.head(self.norm(features))


class TrainingOnly(Chain):
    """Has a head that runs in training only, and gives nothing then."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(8, 3)

    def forward(self, inputs):
        features = self.second(self.first(inputs).tanh())
        if self.training:
            self.side(features)
        return self.head(self.norm(features))


class Told(Observer):
    """Keeps what begins and ends, and calls back."""

    def __init__(self, on_start=lambda: None):
        self.starts, self.ends, self.on_start = [], [], on_start

    def __call__(self, name, event):
        getattr(self, name)(event)

    def stage_start(self, event):
        self.starts.append(event)
        self.on_start()

    def epoch_end(self, event):
        self.ends.append(event)


class Killed(Exception):
    """Stands in for a kill."""


class Bomb(Observer):
    def epoch_end(self, event):
        if (event.stage, event.position.epoch) == ("stage0", 1):
            raise Killed


MODELS = (Chain, Choosing, Repeating, Dropping, TrainingOnly)


def registry(**observers):
    return toy_registry(
        models={cls.__name__: cls for cls in MODELS}, observers={"Bomb": Observer, **observers}
    )


def of_class(name):
    return {"models": {"s": {"type": name}, "t": {"type": name, "seed": 1}}}


def hint(layer="first", of_teacher=None, **more):
    inputs = {"input": f"student.{layer}", "target": f"teacher.{of_teacher or layer}"}
    term = {"type": "MSELoss", "inputs": inputs}
    return {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "criterion": {"hint": term},
        "optimizer": DECAY,
        **more,
    }


def seed_run(folder, *stages, told=None, **keys):
    experiment = toy_experiment(folder, *stages, **{**of_class("Chain"), **keys})
    builder = Builder(experiment, registry())
    models = {name: builder.model(name, 0) for name in experiment.models}
    sources = {name: builder.source(name) for name in experiment.datasets}
    return SeedRun(builder, 0, CPU, folder / "run", told or Told(), models, sources)


def counting(folder, *stages, **keys):
    """A run that counts calls from the first step on."""
    told = Told()
    ready = seed_run(folder, *stages, told=told, **keys)

    def forget():
        for layer in layers(ready):
            layer.calls = 0

    told.on_start = forget
    return ready


def layers(ready):
    models = ready.models.values()
    return [part for model in models for part in model.modules() if isinstance(part, Counted)]


def calls(model):
    return tuple(layer.calls for layer in (model.first, model.second, model.head))


def states(module):
    return copy.deepcopy(module.state_dict())


def moved(module, before):
    return {name for name, v in module.state_dict().items() if not torch.equal(v, before[name])}


def notes(ready):
    return ready.tell.starts[0].notes


STEPS = 6  # 20 samples, 8 a step, 2 epochs


@pytest.mark.parametrize(
    ("layer", "student", "teacher"),
    [
        ("first", (STEPS, 0, 0), (STEPS, 0, 0)),
        ("second", (STEPS, STEPS, 0), (STEPS, STEPS, 0)),
        ("second:input", (STEPS, 0, 0), (STEPS, 0, 0)),
        ("norm:input", (STEPS, STEPS, 0), (STEPS, STEPS, 0)),
    ],
)
def test_what_lies_behind_the_last_value_asked_for_does_not_run(tmp_path, layer, student, teacher):
    ready = counting(tmp_path, hint(layer, data=UNMEASURED))
    before = states(ready.models["s"])
    train_stage(ready, 0)
    assert calls(ready.models["s"]) == student
    assert calls(ready.models["t"]) == teacher
    still = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert not moved(ready.models["s"], before) & still


def test_a_teacher_may_be_cut_where_the_student_runs_whole(tmp_path):
    terms = {**CE, **hint()["criterion"]}
    ready = counting(tmp_path, hint(data=UNMEASURED, criterion=terms))
    train_stage(ready, 0)
    assert calls(ready.models["s"]) == (STEPS, STEPS, STEPS)
    assert calls(ready.models["t"]) == (STEPS, 0, 0)
    assert notes(ready) == [
        "student runs whole: its output is asked for",
        "teacher stops behind what is asked of it (first): 40 of 155 parameters run",
    ]


def test_a_redesign_whole_runs_all_of_it_in_every_step(tmp_path):
    student = {"model": "s", "redesign": "whole"}
    ready = counting(tmp_path, hint(data=UNMEASURED, student=student))
    train_stage(ready, 0)
    assert calls(ready.models["s"]) == (STEPS, STEPS, STEPS)
    assert "student is not cut: redesign: whole" in notes(ready)


def whole(stage):
    return {
        **stage,
        "student": {**stage["student"], "redesign": "whole"},
        "teacher": {**stage["teacher"], "redesign": "whole"},
    }


def batch():
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    return Batch(inputs, torch.arange(6) % 3, torch.arange(6))


def step(folder, stage, **keys):
    """Losses, and gradients by name, of one step on the same batch."""
    ready = seed_run(folder, stage, **keys)
    with ExitStack() as stack:
        distiller = prepare(ready, ready.builder.experiment.stages[0], stack).assembly.distiller
        distiller.train()
        losses = distiller(batch())
        losses["total"].backward()
    gradients = {n: p.grad for n, p in ready.models["s"].named_parameters() if p.grad is not None}
    return losses["hint"], gradients


CASES = [
    ("Chain", "first"),
    ("Chain", "second:input"),
    ("Choosing", "second"),
    ("Repeating", "act@-1"),
    ("Repeating", "act@0"),
    ("Repeating", "act@-2:input"),
    ("Repeating", "act@1:input"),
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_values_and_gradients_are_those_of_the_whole_models(tmp_path, name, layer):
    loss, gradients = step(tmp_path / "cut", hint(layer), **of_class(name))
    expected = step(tmp_path / "whole", whole(hint(layer)), **of_class(name))
    assert torch.equal(loss, expected[0])
    assert gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_weights_after_training_are_those_of_the_whole_models(tmp_path, name, layer):
    """But for running statistics behind the cut, which nothing has asked to be kept."""
    after = []
    for folder, stage in (("cut", hint(layer)), ("whole", whole(hint(layer)))):
        ready = counting(tmp_path / folder, {**stage, "data": UNMEASURED}, **of_class(name))
        train_stage(ready, 0)
        after.append(dict(ready.models["s"].named_parameters()))
        # Which call is the last, only the end of the module around it tells.
        runs_on = folder == "whole" or "@-" in layer
        assert (ready.models["s"].head.calls > 0) is runs_on
    assert all(torch.equal(value, after[1][name]) for name, value in after[0].items())


def test_parameters_that_nothing_comes_from_keep_their_values_in_spite_of_weight_decay(tmp_path):
    ready = seed_run(tmp_path, hint(ema={"decay": 0.5}))
    model = ready.models["s"]
    before = states(model)
    train_stage(ready, 0)
    assert moved(model, before) == {"first.weight", "first.bias"}
    assert all(p.requires_grad for p in model.parameters())
    assert "115 parameters of the student are left out: no loss reaches them" in notes(ready)
    (start,) = ready.tell.starts
    assert (start.parameters, start.trainable) == (155, 40)


def test_the_next_stage_trains_the_whole_student(tmp_path):
    ready = counting(tmp_path, hint(), {"criterion": CE})
    train_stage(ready, 0)
    before = states(ready.models["s"])
    train_stage(ready, 1)
    assert moved(ready.models["s"], before) == set(before)
    assert ready.models["s"].head.calls > STEPS
    assert ready.tell.starts[1].notes == ["teacher does not run: nothing is asked of it"]


def test_evaluation_runs_the_whole_model_in_between_too(tmp_path):
    ready = counting(tmp_path, hint(ema={"decay": 0.5}, evaluate={"every": 1, "unit": "steps"}))
    result = train_stage(ready, 0)
    evaluations, batches = STEPS, 2
    assert ready.models["s"].head.calls == evaluations * batches  # the average has its own
    data, model = ready.sources["val"].dataset, ready.models["s"].eval()
    right = (model(data.inputs).argmax(1) == torch.tensor(data.labels)).float().mean().item()
    assert result.validation["accuracy"] == pytest.approx(right)
    assert set(result.validation) == {"accuracy", "ema.accuracy"}
    assert not model.first._forward_hooks


LEARN_THE_TEACHER = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "optimizer": DECAY,
    "auxiliary": {
        "copy": {
            "type": "Linear",
            "params": {"in_features": 8, "out_features": 8},
            "inputs": {"input": "teacher.first"},
        }
    },
    "criterion": {
        "copy": {"type": "MSELoss", "inputs": {"input": "copy", "target": "teacher.first"}}
    },
}


@pytest.mark.parametrize("keep", ["last", "best", "ema"])
def test_a_student_of_which_nothing_is_asked_does_not_run_and_stays_to_the_last_bit(tmp_path, keep):
    more = {"ema": {"decay": 0.5}, "keep": keep}
    test = {"dataset": "val", "metrics": ["accuracy"]}
    ready = counting(tmp_path, {**LEARN_THE_TEACHER, **more}, test=test)
    before = states(ready.models["s"])
    result = train_stage(ready, 0)
    assert calls(ready.models["s"]) == (0, 0, 0)
    assert moved(ready.models["s"], before) == set()
    assert (result.validation, result.test, result.best_epoch) == ({}, {}, 0)
    assert all(event.metrics == {} for event in ready.tell.ends)
    written = load_file(tmp_path / "run" / "stage0" / "last.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in written.items())
    assert written.keys() == before.keys()
    assert "student does not run: nothing is asked of it" in notes(ready)
    (start,) = ready.tell.starts
    assert start.trainable == 72


def test_a_student_of_which_only_weights_are_asked_is_measured(tmp_path):
    inputs = {"input": "student.head.weight", "target": "teacher.head.weight"}
    stage = {**hint(), "criterion": {"near": {"type": "MSELoss", "inputs": inputs}}}
    assert "accuracy" in train_stage(seed_run(tmp_path, stage), 0).validation


def test_an_auxiliary_module_of_which_nothing_is_asked_does_not_keep_the_model_running(tmp_path):
    linear = {"type": "Linear", "params": {"in_features": 3, "out_features": 3}}
    idle = {**linear, "inputs": {"input": "student.head"}}
    fed = {**linear, "inputs": {"input": "idle"}}
    stage = hint(data=UNMEASURED, auxiliary={"idle": idle, "fed": fed})
    ready = counting(tmp_path, stage)
    train_stage(ready, 0)
    assert calls(ready.models["s"]) == (STEPS, 0, 0)
    assert {
        "idle does not run: nothing is asked of it",
        "fed does not run: nothing is asked of it",
    } <= set(notes(ready))


def test_a_teacher_of_which_nothing_is_asked_runs_only_to_be_measured(tmp_path):
    ready = counting(tmp_path, {**hint(), "criterion": CE})
    result = train_stage(ready, 0)
    assert calls(ready.models["t"]) == (0, 0, 0)
    assert result.teachers["teacher"].keys() == {"accuracy"}


def test_a_model_whose_way_depends_on_its_data_is_stopped_all_the_same(tmp_path):
    ready = counting(tmp_path, hint("second", data=UNMEASURED), **of_class("Choosing"))
    train_stage(ready, 0)
    assert calls(ready.models["s"]) == (STEPS, STEPS, 0)
    stops = "student stops behind what is asked of it (second): 112 of 155 parameters run"
    assert stops in notes(ready)


@pytest.mark.parametrize("layer", ["act@0", "act@1", "act@-1"])
def test_a_layer_called_several_times_stops_the_model_behind_the_call_asked_for(tmp_path, layer):
    ready = seed_run(tmp_path, hint(layer, data=UNMEASURED), **of_class("Repeating"))
    made = []
    ready.tell.on_start = made.clear
    ready.models["s"].act.register_forward_hook(lambda *_: made.append(1))
    train_stage(ready, 0)
    expected = {"act@0": 1, "act@1": 2, "act@-1": 3}[layer]
    assert len(made) == STEPS * expected


def test_the_last_call_is_the_last_where_their_number_changes(tmp_path):
    ready = seed_run(tmp_path, hint("act@-1"), **of_class("Repeating"))
    with ExitStack() as stack:
        distiller = prepare(ready, ready.builder.experiment.stages[0], stack).assembly.distiller
        student = ready.models["s"]
        student.times = 4
        found = distiller.values(batch())["student.act@-1"]
        features = student.first(batch().inputs)
        for _ in range(4):
            features = (2 * features).tanh()
    torch.testing.assert_close(found, features)


def test_layers_dropped_at_random_in_training_keep_their_parameters(tmp_path):
    """Though they are dropped when two samples go through first, as with most of these seeds."""
    rehearsed = []
    for seed in range(4):
        stage = hint("norm", data=UNMEASURED, epochs=10)
        ready = seed_run(tmp_path / str(seed), stage, **of_class("Dropping"))
        ready.seed = seed
        before, modes = states(ready.models["s"]), []
        second = ready.models["s"].second
        second.register_forward_hook(lambda m, *_, modes=modes: modes.append(m.training))
        ready.tell.on_start = lambda modes=modes: rehearsed.append(any(modes))
        train_stage(ready, 0)
        assert 0 < sum(modes) < 30
        assert moved(ready.models["s"], before) >= {"second.weight", "norm.weight", "first.bias"}
        assert not moved(ready.models["s"], before) & {"head.weight", "head.bias"}
    assert False in rehearsed


def test_a_layer_that_runs_in_training_only_may_be_asked_for(tmp_path):
    stage = hint("side")
    stage["criterion"]["hint"]["inputs"]["target"] = "teacher.head"
    stage["teacher"] = {"model": "t", "mode": "train"}
    ready = seed_run(tmp_path, stage, **of_class("TrainingOnly"))
    before = states(ready.models["s"].side)
    train_stage(ready, 0)
    assert moved(ready.models["s"].side, before) == {"weight", "bias"}


def prepared_notes(folder, stage):
    ready = seed_run(folder, stage)
    with ExitStack() as stack:
        prepared = prepare(ready, ready.builder.experiment.stages[0], stack)
        extents = dict(prepared.assembly.distiller.extents)
        return extents, stage_notes(prepared.assembly, prepared.plan, prepared.rehearsal)


def test_a_compiled_model_is_not_cut_and_that_is_told(tmp_path):
    extents, told = prepared_notes(tmp_path, hint(compile=["student"]))
    assert extents == {"student": "whole", "teacher": "part"}
    assert told[0] == "student is not cut: it is compiled"
    assert told[1].startswith("teacher stops behind")


def test_a_model_of_which_each_process_holds_a_part_is_not_cut_and_that_is_told(
    tmp_path, monkeypatch
):
    stage = hint(parallel="fsdp")
    extents, told = prepared_notes(tmp_path / "alone", stage)
    assert extents == {"student": "part", "teacher": "part"}
    assert told[-1] == "parallel: fsdp has nothing to share out in a single process"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    extents, told = prepared_notes(tmp_path / "two", stage)
    assert extents == {"student": "whole", "teacher": "whole"}
    reason = "is not cut: parallel: fsdp gathers whole forwards"
    assert told[:2] == [f"student {reason}", f"teacher {reason}"]


def test_a_run_killed_in_a_cut_stage_goes_on_to_the_same_bits(tmp_path):
    files = []
    for folder, kill in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        experiment = toy_experiment(
            folder, hint(epochs=3), {"criterion": CE}, **of_class("Chain"), observers=["Bomb"]
        )
        if kill:
            with pytest.raises(Killed):
                run(experiment, registry=registry(Bomb=Bomb), runs=folder)
        result = run(experiment, registry=registry(), runs=folder)
        names = sorted(result.directory.rglob("last.safetensors"))
        files.append([file.read_bytes() for file in names])
    assert files[0] == files[1]


def test_a_stage_leaves_no_hook_and_no_stop_behind(tmp_path):
    ready = seed_run(tmp_path, hint("second"))
    train_stage(ready, 0)
    for model in ready.models.values():
        hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        assert not any(hooks)
        assert model(batch().inputs).shape == (6, 3)


def test_reduced_precision_is_cut_too(tmp_path):
    ready = counting(tmp_path, hint(data=UNMEASURED, precision="bf16"))
    train_stage(ready, 0)
    assert calls(ready.models["s"]) == (STEPS, 0, 0)


def test_two_processes_train_a_cut_stage_to_the_weights_of_one(tmp_path):
    """And then one that is not cut since each holds a part of it, and one that is whole."""
    data = {"train": "train", "validate": "val", "batch_size": 5}
    both = {"criterion": {**CE, **hint("second")["criterion"]}}
    stages = (hint("second", data=data), {**both, "parallel": "fsdp"}, {**both, "parallel": "ddp"})
    toy_experiment(tmp_path, *stages, **of_class("Chain"))
    run_file(tmp_path, "one")
    run_processes(__file__, str(tmp_path))
    for stage in range(3):
        one, two = (
            load_file(tmp_path / runs / "toy" / f"stage{stage}" / "last.safetensors")
            for runs in ("one", "two")
        )
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


def test_a_stage_that_asks_for_features_alone_can_be_sharded(tmp_path):
    toy_experiment(tmp_path, hint("second", parallel="fsdp", epochs=1), **of_class("Chain"))
    run_processes(__file__, str(tmp_path))


class Watched(parallel.DistributedDataParallel):
    """Sees to it that nothing trains that gets no gradient."""

    def __init__(self, *args, find_unused_parameters, **more):
        assert not find_unused_parameters
        super().__init__(*args, find_unused_parameters=False, **more)


def run_file(folder, runs):
    run(load(folder / "toy.yaml"), registry=registry(), runs=folder / runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.DistributedDataParallel = Watched
    run_file(Path(sys.argv[1]), "two")
